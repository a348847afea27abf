"""AdamW that rounds at random: against torch's AdamW, published words of Philox, closed forms, an interrupted run."""

import copy
import math

import pytest
import torch

from hf_moe_cpt.optim import adamw
from hf_moe_cpt.optim.adamw import (
    SIGNED,
    UNSIGNED,
    StochasticAdamW,
    plain_decode,
    plain_encode,
    plain_philox,
    plain_round,
    plain_words,
)
from tests.helpers.expert_layers import DEVICE
from tests.helpers.fresh_process import run_python


SHAPES = ((3, 7), (290,), (16, 32))  # within a span of 64; more than a program's four spans; whole and aligned
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture
def by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition in place of the kernel, which the interpreter runs slowly."""
    monkeypatch.setattr(adamw, "IS_INTERPRETED", False)


def weights(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with gradients that depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            weight.grad = torch.randn(weight.shape, generator=generator).to(DEVICE, weight.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that come with Random123, the authors' library
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: int, words: list[int]) -> None:
    assert plain_philox(torch.tensor(counter[:1]), tuple(counter[1:]), key)[:, 0].tolist() == words


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.bfloat16, 8), (torch.float32, 16)])
def test_kernel_equals_the_definition(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "SPAN", 64)
    by_kernel = StochasticAdamW(weights(dtype), seed=2**40 + 7, bits=bits, **SETTINGS)
    take_steps(by_kernel, 0, 2)
    monkeypatch.setattr(adamw, "_launch_of", lambda work: None)
    plain = StochasticAdamW(weights(dtype), seed=2**40 + 7, bits=bits, **SETTINGS)
    take_steps(plain, 0, 2)
    in_bytes = [plain.state[weight]["exp_avg"].dtype == torch.uint8 for weight in plain.param_groups[0]["params"]]
    assert in_bytes == ([False, True, True] if bits == 8 else [False] * 3)
    for ours, theirs in zip(by_kernel.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        for got, want in (
            (ours, theirs),
            *((by_kernel.state[ours][name], plain.state[theirs][name]) for name in ("exp_avg", "exp_avg_sq")),
        ):
            if dtype == torch.bfloat16:  # sums differ in their last bit, which decides a rounding once in 10,000 times
                assert (got != want).float().mean() < 2e-3
            if got.dtype == torch.uint8:
                continue
            torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        if "exponent" in plain.state[theirs]:
            for name in ("exponent", "exponent_sq"):
                assert torch.equal(by_kernel.state[ours][name], plain.state[theirs][name])


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=pytest.mark.slow), False])
def test_scaled_gradients_are_those_of_a_smaller_loss(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping by a power of two, which rounds nothing, for one step."""
    monkeypatch.setattr(adamw, "SPAN", 64)
    monkeypatch.setattr(adamw, "IS_INTERPRETED", adamw.IS_INTERPRETED and interpreted)
    scaled, smaller = (StochasticAdamW(weights(torch.bfloat16), seed=1, **SETTINGS) for _ in range(2))
    for optimizer, factor in ((scaled, 1.0), (smaller, 0.25)):
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = factor * torch.ones_like(weight)
    scaled.grad_scale = torch.tensor(0.25, device=DEVICE)
    for _ in range(2):
        scaled.step()
        smaller.step()
        for got, want in zip(scaled.param_groups[0]["params"], smaller.param_groups[0]["params"], strict=True):
            assert torch.equal(got, want)
            got.grad = want.grad  # the scale was for one step
    assert scaled.grad_scale is None


def test_float32_weights_take_the_steps_of_torch(by_definition: None) -> None:
    ours, theirs = weights(torch.float32), weights(torch.float32)
    take_steps(StochasticAdamW(ours, **SETTINGS), 0, 5)
    take_steps(torch.optim.AdamW(theirs, **SETTINGS), 0, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    """The mean over all 65,536 noises is the value itself, exactly in float64; NaN and infinity stay what they are."""
    values = torch.tensor([1.001, -1.001, 3.1415927, -2e-5, 1e-30, 0.0])
    noise = torch.arange(1 << 16)
    rounded = plain_round(values[:, None].expand(-1, 1 << 16).contiguous(), noise.expand(len(values), -1))
    torch.testing.assert_close(rounded.double().mean(1), values.double(), rtol=1e-12, atol=0)
    distance = (rounded.float() - values[:, None]).abs()
    assert (distance < values[:, None].abs() / 128 + 1e-40).all()
    special = plain_round(torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([65535] * 3))
    assert special[0].isnan() and special[1:].tolist() == [math.inf, -math.inf]
    negative_nan = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the noise would carry out
    assert plain_round(negative_nan, torch.tensor([65535] * 2)).isnan().all()


@pytest.mark.parametrize(("top", "reach"), [(SIGNED, 2.0**-14), (UNSIGNED, 2.0**-30)])
def test_bytes_are_unbiased_within_their_reach(top: int, reach: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all 256 noises is the value, what is far below the largest of a span too if it has a sign."""
    monkeypatch.setattr(adamw, "SPAN", 2)
    values = torch.tensor([1.0, 0.9999, 0.3, 0.017, reach, 0.0, 0.77, 1.3e-3]) * 3.7e-5
    if top == SIGNED:
        values = torch.cat([values, -values, torch.tensor([1e-38, 1.0, 0.0, -0.5, 3e-5, 2e-5, -2e-5, 1.7])])
    spans, count = len(values) // 8, 256
    mean = torch.zeros_like(values, dtype=torch.float64)
    for noise in range(count):
        codes, exponent = plain_encode(values, torch.full_like(values, noise, dtype=torch.int64), top)
        assert codes.dtype == exponent.dtype == torch.uint8 and exponent.shape == (spans,)
        decoded = plain_decode(codes, exponent, top)
        assert ((decoded - values).abs() <= values.abs() / 8 + 2**-14).all()
        mean += decoded.double() / count
    torch.testing.assert_close(mean, values.double(), rtol=2e-3, atol=2e-7)
    kept = plain_decode(*plain_encode(torch.tensor([1.0, 1e-20]), torch.tensor([255, 255]), UNSIGNED), UNSIGNED)
    assert kept[1] > 0  # a second moment never becomes 0


@pytest.mark.slow
def test_moments_of_bytes_learn_what_those_of_bfloat16_learn(by_definition: None) -> None:
    """A least-squares problem with gradients of many sizes, 300 steps: losses after it, from 1, beside torch's."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-4, 0, 64)
    inputs = torch.randn(256, 64, generator=generator) * scales
    target = inputs @ (torch.randn(64, 64, generator=generator) / scales[:, None])
    losses = {}
    for way in ("torch", 16, 8):
        dtype = torch.float32 if way == "torch" else torch.bfloat16
        weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        settings = {"lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0.0}
        made = (
            torch.optim.AdamW([weight], **settings)
            if way == "torch"
            else StochasticAdamW([weight], bits=way, **settings)
        )
        for _ in range(300):
            loss = (inputs @ weight.float() - target).square().mean() / target.square().mean()
            made.zero_grad()
            loss.backward()
            made.step()
        losses[way] = loss.item()
    assert losses[8] == pytest.approx(losses[16], rel=0.02), losses
    assert losses[8] == pytest.approx(losses["torch"], rel=0.02) and losses["torch"] < 0.99, losses


def test_small_updates_arrive_where_rounding_to_the_nearest_loses_them(by_definition: None) -> None:
    """4,096 weights of 1 under a constant gradient: Adam goes lr a step, 1e-3 in all, a quarter of the distance."""
    lr, steps, count = 1e-5, 100, 4096
    ours = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    theirs = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizers = [
        StochasticAdamW([ours], lr=lr, weight_decay=0.0, seed=3),
        torch.optim.AdamW([theirs], lr=lr, weight_decay=0.0),
    ]
    for _ in range(steps):
        for optimizer, weight in zip(optimizers, (ours, theirs), strict=True):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert (theirs == 1).all()
    moved = (1 - ours.double()).mean().item()
    # below 1 the distance is 2^-8; variance of a step: at most lr * 2^-8
    error = math.sqrt(steps * lr * 2**-8 / count)
    assert abs(moved - steps * lr) < 5 * error, (moved, error)


@pytest.mark.parametrize("bits", [8, 16])
def test_second_moment_falls_with_a_slow_coefficient(bits: int, by_definition: None) -> None:
    """With b2 = 0.999 and no gradient v is 0.999^n of what it was; rounded to the nearest it would stay for ever."""
    weight = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=0.0, betas=(0.9, 0.999), bits=bits)

    def mean() -> float:
        state = optimizer.state[weight]
        moment = state["exp_avg_sq"]
        return float((plain_decode(moment, state["exponent_sq"], UNSIGNED) if bits == 8 else moment).double().mean())

    weight.grad = torch.ones_like(weight)
    optimizer.step()
    start = mean()
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    assert mean() / start == pytest.approx(0.999**100, rel=0.01)
    assert (torch.tensor(0.5, dtype=torch.bfloat16) * 0.999).bfloat16() == 0.5


def test_random_bits_are_a_function_of_seed_step_place_shard_and_element() -> None:
    base = {"numel": 5000, "place": 1, "step": 2, "shard": 0, "seed": 3, "device": torch.device("cpu")}
    words = plain_words(**base)
    assert words.unique().numel() > 4990 and torch.equal(words, plain_words(**base))
    assert torch.equal(plain_words(**{**base, "numel": 100}), words[:100])
    for name in ("place", "step", "shard", "seed"):
        assert (plain_words(**{**base, name: 9}) == words).float().mean() < 0.01, name
    bits = torch.stack([(words >> shift & 1).double().mean() for shift in range(32)])
    assert ((bits - 0.5).abs() < 5 * 0.5 / math.sqrt(5000)).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_resumed_run_equals_an_uninterrupted_one(
    bits: int, by_definition: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "SPAN", 64)
    straight = StochasticAdamW(weights(torch.bfloat16), seed=5, bits=bits, **SETTINGS)
    take_steps(straight, 0, 4)
    first = StochasticAdamW(weights(torch.bfloat16), seed=5, bits=bits, **SETTINGS)
    take_steps(first, 0, 2)
    resumed = StochasticAdamW([copy.deepcopy(w) for w in first.param_groups[0]["params"]], seed=99, **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(resumed, 2, 4)
    for got, want in zip(resumed.param_groups[0]["params"], straight.param_groups[0]["params"], strict=True):
        assert torch.equal(got, want)
        in_bytes = bits == 8 and got.numel() >= 256
        assert resumed.state[got]["exp_avg"].dtype == (torch.uint8 if in_bytes else torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": math.nan}, "eps=nan"),
        ({"bits": 4}, "bits=4"),
    ],
)
def test_refuses_settings_out_of_range(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticAdamW([torch.nn.Parameter(torch.zeros(2))], **changes)


def test_refuses_float16_weights() -> None:
    with pytest.raises(ValueError, match="got torch.float16"):
        StochasticAdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))])


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from hf_moe_cpt.optim import adamw

adamw.IS_INTERPRETED = False

def trained(steps, sharded, state=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to(torch.bfloat16)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = adamw.StochasticAdamW(model.parameters(), lr=1e-2, seed=3)
    if state is not None:
        set_optimizer_state_dict(model, optimizer, state)
    for step in range(steps):
        model(torch.ones(5, 8, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
whole, _ = trained(3, False)
shards, optimizer = trained(3, True)
print(all(torch.equal(a, b.full_tensor()) for a, b in zip(whole.parameters(), shards.parameters(), strict=True)))
_, loaded = trained(0, True, get_optimizer_state_dict(shards, optimizer))
states = list(loaded.state.values())
print({int(state["step"]) for state in states}, {str(state["exp_avg"].dtype) for state in states})
dist.destroy_process_group()
for rank in (0, 1):
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    mesh = init_device_mesh("cpu", (2,))
    parts = ((torch.zeros(3, 8), Shard(0)), (torch.zeros(6, 4), Shard(1)))
    print([adamw._first_element(DTensor.from_local(part, mesh, [cut], run_check=False)) for part, cut in parts])
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_fsdp2_step_as_the_whole_does_and_each_with_bits_of_its_own() -> None:
    """A rank's part starts at an element of the whole (6, 8): row 3 and column 4 of the second rank are 24 and 4."""
    same, state, first, second = run_python("-c", SHARDED).stdout.splitlines()
    assert (same, state) == ("True", "{3} {'torch.bfloat16'}")
    assert (first, second) == ("[0, 0]", "[24, 4]")
