"""Time arithmetic: operations against torch's counter, a reference's cost against its benchmark, transfers by hand."""

import csv
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.planning import plan
from hf_moe_cpt.planning.memory import TrainingSetup, measure_size
from tests.helpers.source_tree import PROJECT


DENSE = measure_size(CptMoeConfig.from_preset("dense-tiny"), "dense-tiny")
GRANULAR = measure_size(CptMoeConfig.from_preset("pb-granular-tiny"), "pb-granular-tiny")
STEP = plan.MeasuredStep("other", "fused", False, 64, 1_000.0, 5e9, "GPU", "2026-01-01", "abc")


def test_operations_are_those_that_torch_counts() -> None:
    """All products of a real step; torch counts attention whole, where causal attention needs half."""
    model = AutoModelForCausalLM.from_config(CptMoeConfig.from_preset("dense-tiny"), attn_implementation="eager")
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    whole_attention = replace(DENSE, attention_width=2 * DENSE.attention_width)
    # what torch does not do: the gradient of the embedding's output costs no product
    assert counter.get_total_flops() / ids.numel() == pytest.approx(plan.flops_per_token(whole_attention, 64), 2e-3)


def test_a_reference_costs_one_forward_as_measured() -> None:
    """Four thirds, within 3 % of the committed times of steps with and without one."""
    with (PROJECT / "docs/benchmarks/h200/preference_full.csv").open() as file:
        times = {row["contender"]: float(row["total_ms"]) for row in csv.DictReader(file)}
    setup = TrainingSetup(trainer="rainbowpo", reference="copy")
    estimate = plan.forwards_of(setup) / plan.forwards_of(replace(setup, reference="none"))
    assert estimate == pytest.approx(times["rainbowpo"] / times["rainbowpo-no-reference"], rel=0.03)
    assert plan.forwards_of(replace(setup, reference="none", checkpointing=True)) == 4.0


def test_time_scales_with_operations_device_and_gpus() -> None:
    setup = TrainingSetup(engine="ddp", gpus=4, batch_size=3, sequence_length=64, accumulation=2)
    time = plan.training_time(DENSE, setup, [STEP], device_factor=0.5, bandwidth=1e9)
    tokens = 3 * 64 * 2
    assert time.compute_seconds == pytest.approx(tokens * plan.flops_per_token(DENSE, 64) / (1_000 * 5e9 * 0.5))
    assert time.transfer_seconds == pytest.approx(2 * 3 / 4 * DENSE.total * 4 / 1e9)
    assert time.tokens_per_step == 4 * tokens
    assert not time.is_same_model
    least, most = time.days(10 * time.tokens_per_step)
    assert least == pytest.approx(10 * time.compute_seconds / 86_400)
    assert most == pytest.approx(10 * (time.compute_seconds + time.transfer_seconds) / 86_400)


def test_what_travels() -> None:
    setup = TrainingSetup(gpus=16, gpus_per_node=8, batch_size=1, sequence_length=64, accumulation=2)
    total, experts = GRANULAR.total, GRANULAR.experts
    assert plan.bytes_sent(GRANULAR, TrainingSetup()) == (0.0, 0.0)
    assert plan.bytes_sent(GRANULAR, replace(setup, engine="fsdp2")) == (0.0, 15 / 16 * 6 * 2 * total)
    inside, across = plan.bytes_sent(GRANULAR, replace(setup, engine="hsdp"))
    assert inside == 7 / 8 * 6 * 2 * total
    assert across == 2 * (1 - 1 / 2) * 2 * total / 8
    inside, across = plan.bytes_sent(GRANULAR, replace(setup, engine="ep"))
    assert inside == 7 / 8 * 8 * (64 * 2 * 4) * 3 * 128  # 2 passes of 64 tokens in 4 layers, 3 experts, 128 numbers
    assert across == pytest.approx(15 / 16 * 6 * 2 * (total - experts) + 2 / 2 * 2 * experts / 8)


def test_the_nearest_step_is_taken() -> None:
    mixture = replace(STEP, model="mixture", is_mixture=True)
    plain = replace(STEP, model=GRANULAR.name, kernels="plain")
    assert plan.nearest_step(GRANULAR, "fused", [STEP, mixture, plain]) is mixture
    assert plan.nearest_step(GRANULAR, "plain", [STEP, mixture, plain]) is plain
    assert plan.nearest_step(DENSE, "fused", [mixture, STEP]) is STEP
    assert plan.nearest_step(DENSE, "experts", [mixture, STEP]) is STEP
    like = replace(
        mixture, flops_per_token=plan.flops_per_token(GRANULAR, mixture.sequence_length), model="of a friend"
    )
    assert plan.nearest_step(GRANULAR, "fused", [mixture, like, replace(like, tokens_per_second=1e9)]) is like
    with pytest.raises(ValueError, match="No measured steps"):
        plan.nearest_step(DENSE, "fused", [])
