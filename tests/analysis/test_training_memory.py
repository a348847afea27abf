"""Memory arithmetic: states against a real optimizer, sharding against division, moments against each other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_moe_cpt.analysis.kept_tensors import KeptBytes
from hf_moe_cpt.analysis.training_memory import (
    ModelSize,
    TrainingSetup,
    head_bytes,
    parameters_held,
    training_memory,
)


SIZE = ModelSize(
    name="a model",
    total=10_000,
    embedding=500,
    head=500,
    layers=(3_000, 3_000, 3_000),
    experts=6_200,
    active=2_000,
    num_experts=31,
    experts_per_token=3,
    vocab_size=50,
    hidden_size=10,
    attention_width=10,
    is_tied=False,
)
KEPT = KeptBytes(fixed=100, outside=1_000, layers=(40_000, 40_000, 40_000), layer_input=500)
DTYPES = {"mixed": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda weights: torch.optim.SGD(weights, momentum=0.9),
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_those_of_a_real_step(optimizer: str, precision: str) -> None:
    """Weights, gradients and optimizer states after a step, to the byte; Adam's step counts are left out."""
    model = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 8, bias=False)).to(DTYPES[precision])
    stepper = OPTIMIZERS[optimizer](model.parameters())
    model(torch.ones(2, 16, dtype=DTYPES[precision])).float().sum().backward()
    stepper.step()
    weights = list(model.parameters())
    states = [state for of_weight in stepper.state.values() for state in of_weight.values() if state is not None]
    size = replace(SIZE, total=sum(weight.numel() for weight in weights))
    setup = TrainingSetup(precision=precision, optimizer=optimizer, accumulation=2)
    memory = training_memory(size, KEPT, setup)
    assert memory.weights == sum(weight.nbytes for weight in weights)
    assert memory.gradients == sum(weight.grad.nbytes for weight in weights)
    assert memory.optimizer == sum(state.nbytes for state in states if state.ndim)


def test_sharding_divides_states_and_leaves_experts_whole() -> None:
    def held(engine: str, gpus: int, gpus_per_node: int = 8) -> int:
        return parameters_held(SIZE, TrainingSetup(engine=engine, gpus=gpus, gpus_per_node=gpus_per_node))

    assert held("ddp", 8) == SIZE.total
    assert held("zero3", 16) == SIZE.total / 16
    assert (
        held("fsdp2", 8) == held("hsdp", 16) == held("ep", 8) == 3_800 / 8 + 4 * 200
    )  # 31 experts, 8 ranks: 4 on each
    assert held("ep", 16) == 238 + 4 * 200  # 3,800 / 16, rounded up; the other node holds the same experts
    assert held("fsdp2", 64) == 60 + 200  # 31 ranks have an expert
    assert held("ep", 2, gpus_per_node=2) == 3_800 / 2 + 16 * 200
    with pytest.raises(ValueError, match=r"^engine='ep' spreads experts, and a model has none: take 'fsdp2'\.$"):
        parameters_held(replace(SIZE, num_experts=0, experts=0), TrainingSetup(engine="ep", gpus=2))


def test_total_is_the_sum_at_the_fuller_moment() -> None:
    setup = TrainingSetup(batch_size=1, sequence_length=4, kernels="fused")
    begin = training_memory(SIZE, KEPT, setup)
    assert (begin.moment, begin.gradients) == ("begin", 0)
    assert begin.activations == KEPT.of_batch(1) + KEPT.fixed
    end = training_memory(SIZE, replace(KEPT, layers=(10, 10, 10)), setup)
    assert (end.moment, end.gradients, end.head) == ("end", 4 * SIZE.total, 0)
    for memory in (begin, end):
        parts = ("weights", "gradients", "optimizer", "reference", "activations", "head", "workspace")
        assert memory.total == sum(getattr(memory, part) for part in parts)


def test_what_adds_to_memory_and_what_takes_off() -> None:
    setup = TrainingSetup(batch_size=2, sequence_length=4)

    def total(**changes: object) -> int:
        return training_memory(SIZE, KEPT, replace(setup, **changes)).total

    alone = total()
    assert total(accumulation=2) == alone + 4 * SIZE.total
    assert total(trainer="surgery", terms=2, reference="copy") > total(trainer="surgery", terms=2, reference="cache")
    assert total(trainer="surgery", terms=2) == total(trainer="surgery", terms=5)  # one term after the other
    assert total(engine="ddp", gpus=2) == alone + 4 * SIZE.total
    assert total(engine="ddp", gpus=1) == alone
    assert total(checkpointing=True) == alone - 2 * (3 - 1) * 40_000 + 2 * 3 * 500
    assert total(trainer="rainbowpo", reference="copy") == total(trainer="rainbowpo") + 4 * SIZE.total
    assert total(optimizer="adamw_8bit") == alone - 6 * SIZE.total


def test_head_without_fusion_is_three_float32_logits() -> None:
    setup = TrainingSetup(batch_size=2, sequence_length=4, kernels="plain")
    assert head_bytes(SIZE, setup)[0] == 3 * 4 * (2 * 4) * SIZE.vocab_size
    fused = head_bytes(replace(SIZE, vocab_size=10**6), replace(setup, kernels="fused", sequence_length=4096))
    assert fused[0] - fused[1] < 513 * 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tp"}, r"^engine='tp' is unknown: choose from single, ddp, fsdp2, hsdp, zero3, ep\.$"),
        ({"optimizer": "lamb"}, r"^optimizer='lamb' is unknown: choose from adamw, sgd_momentum, sgd, adamw_8bit\.$"),
        ({"gpus": 0}, r"^gpus=0 must be at least 1\.$"),
    ],
)
def test_a_bad_setup_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSetup(**changes)
