"""How a run is held on the GPU at hand: against the estimate of each way, and OLMoE-1B-7B on GPUs that people have."""

import functools
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, TrainingArguments

from hf_moe_cpt.planning import plan
from hf_moe_cpt.planning.memory import (
    KeptBytes,
    ModelSize,
    TrainingSetup,
    measure_kept,
    measure_size,
    training_memory,
)
from hf_moe_cpt.planning.plan import ASKED, choose_fit, fit_to_gpu
from tests.helpers.tiny_moes import moe_model


GIBIBYTE = 2**30
TINY = OlmoeConfig(
    vocab_size=512, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
)  # fmt: skip
SETUP = TrainingSetup(batch_size=8, sequence_length=64)
WAYS = [  # type of the weights, checkpointing, optimizer
    *(("float32", is_on, "adamw") for is_on in (False, True)),
    *(("bfloat16", is_on, optimizer) for is_on in (False, True) for optimizer in ("adamw", "adamw_8bit")),
]


@functools.cache
def tiny_size(name: str) -> ModelSize:
    return measure_size(TINY, name)


@functools.cache
def tiny_kept(length: int, precision: str, kernels: str) -> KeptBytes:
    return measure_kept(TINY, length, precision, kernels)


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a model takes a second."""
    for name, once in (("measure_size", tiny_size), ("measure_kept", tiny_kept)):
        real = getattr(plan, name)
        monkeypatch.setattr(
            plan, name, lambda config, *words, r=real, o=once: o(*words) if config is TINY else r(config, *words)
        )


def needed(dtype: str, checkpointing: bool, optimizer: str = "adamw", setup: TrainingSetup = SETUP) -> float:
    """GiB by the planner's own arithmetic."""
    way = replace(setup, precision=plan.PRECISION_OF[dtype], checkpointing=checkpointing, optimizer=optimizer)
    kept = tiny_kept(way.sequence_length, way.precision, way.kernels)
    return training_memory(tiny_size("tiny"), kept, way).total / GIBIBYTE


def test_the_first_way_that_fits_is_taken() -> None:
    sizes = {way: needed(*way) for way in WAYS}
    for way, size in sizes.items():
        first = next(other for other in WAYS if sizes[other] <= size)
        chosen = choose_fit(TINY, SETUP, "tiny", 1.001 * size / (1 - 0.06))
        optim = "adamw_stochastic_8bit" if first[2] == "adamw_8bit" else "auto"
        assert (chosen.dtype, chosen.checkpointing, chosen.optim) == (*first[:2], optim), way
    least = min(sizes.values())
    tight = choose_fit(TINY, SETUP, "tiny", 1.01 * least)
    assert sizes[tight.dtype, tight.checkpointing, "adamw_8bit"] == least and tight.told.endswith("which is tight.")


def test_what_is_asked_for_is_kept() -> None:
    chosen = choose_fit(TINY, SETUP, "tiny", 80.0, dtype="bfloat16", checkpointing=True)
    assert (chosen.dtype, chosen.checkpointing) == ("bfloat16", True)
    assert chosen.told.startswith("tiny: bfloat16 weights, gradient checkpointing; about ")


def test_a_configuration_is_left_as_it_is() -> None:
    config = deepcopy(TINY)
    choose_fit(config, SETUP, "tiny", 80.0)
    assert config._experts_implementation == TINY._experts_implementation
    assert "count" not in str(config._experts_implementation)  # a stand-in without a backward pass


def test_what_cannot_fit_is_refused_with_options_that_make_it_fit() -> None:
    least = min(needed("bfloat16", is_on, "adamw_8bit") for is_on in (True, False))
    with pytest.raises(
        ValueError, match=r"tiny needs about .* it would fit with --rows \d+ --gradient_accum"
    ) as refused:
        choose_fit(TINY, SETUP, "tiny", 0.9 * least, batch_option="--rows")
    words = str(refused.value).partition("--rows ")[2].split()
    assert int(words[0]) * int(words[2]) >= SETUP.batch_size
    smaller = replace(SETUP, batch_size=int(words[0]))
    assert choose_fit(TINY, smaller, "tiny", 0.9 * least).dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"fit with --dtype bfloat16 --gradient_checkpointing or .*--use_peft\.$"):
        choose_fit(TINY, SETUP, "tiny", 1.1 * least, dtype="float32", checkpointing=False)
    assert choose_fit(TINY, SETUP, "tiny", 0.9 * least, refuses=False).dtype == "bfloat16"


def test_layers_that_are_not_counted_are_checkpointed_unless_somebody_decided() -> None:
    config = moe_model("qwen3_next").config  # a recurrent layer among two
    for asked, taken in ((None, True), (False, False)):
        assert choose_fit(config, SETUP, "hybrid", 80.0, checkpointing=asked).checkpointing is taken


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_olmoe_is_trained_on_one_gpu_of_80_gb_and_refused_by_one_of_40(kernels: str) -> None:
    """README's command: the default batch of 8 rows of 2,048 tokens; 79.1 GiB are what an H100 has free."""
    config = OlmoeConfig(intermediate_size=1024, max_position_embeddings=4096)
    setup = TrainingSetup(batch_size=8, sequence_length=2048, kernels=kernels)
    assert 6.9e9 < measure_size(config, "OLMoE").total < 7e9
    assert choose_fit(config, setup, "OLMoE", 79.1).optim == "auto"
    assert choose_fit(config, setup, "OLMoE", 79.1).dtype == "bfloat16"
    small = choose_fit(config, setup, "OLMoE", 52.0)
    assert (small.dtype, small.checkpointing) == ("bfloat16", kernels == "plain")
    assert small.optim == "adamw_stochastic_8bit"
    assert choose_fit(config, setup, "OLMoE", 139.0).dtype == "float32"
    with pytest.raises(ValueError, match=r"OLMoE needs about [34]\d\.\d GiB .* fit with 2 GPUs .* or --use_peft"):
        choose_fit(config, setup, "OLMoE", 39.4)


def arguments(**changes: Any) -> SimpleNamespace:
    settings = {"dtype": None, "use_peft": False, "freeze": None, "model_name_or_path": "tiny", **changes}
    return SimpleNamespace(**settings)


@pytest.fixture
def on_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> TrainingArguments:
    """Arguments of a process on a GPU of 80 GiB, as far as the choice looks at it."""
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    training.freeze, training.optim = None, "adamw_stochastic"  # of our trainers' arguments
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "gpu_gib", lambda device: 80.0)
    monkeypatch.setattr(plan, "_with_autocast", lambda training, asked: training)
    return training


def test_a_command_takes_what_fits_and_on_a_cpu_float32(on_gpu, tmp_path, monkeypatch, capsys) -> None:
    asked, setup = dict.fromkeys(ASKED), {"batch_size": 8, "sequence_length": 64}
    model = arguments()
    fit_to_gpu(model, on_gpu, asked, setup, {}, config=TINY)
    assert model.dtype == "float32" and not on_gpu.gradient_checkpointing
    assert capsys.readouterr().out.startswith("tiny: float32 weights under bfloat16 autocast; about 0.")
    monkeypatch.setattr(
        plan, "gpu_gib", lambda device: needed("bfloat16", True, setup=replace(SETUP, kernels="fused"))
    )
    model = arguments()
    fit_to_gpu(model, on_gpu, asked, setup, {}, config=TINY)
    assert model.dtype == "bfloat16" and on_gpu.gradient_checkpointing
    model = arguments(use_peft=True)
    fit_to_gpu(model, on_gpu, asked, setup, {}, config=TINY)
    assert model.dtype == "bfloat16"  # frozen under an adapter
    model = arguments(dtype="auto")
    fit_to_gpu(model, on_gpu, asked, setup, {}, config=TINY)
    assert model.dtype == "auto"
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cpu"))
    model = arguments()
    fit_to_gpu(model, on_gpu, asked, setup, {}, config=TINY)
    assert model.dtype == "float32"
