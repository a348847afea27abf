"""The Sinkhorn operator against the model's definition in float64, its marginals, padding and extreme logits."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_moe_cpt.kernels import sinkhorn
from hf_moe_cpt.kernels.sinkhorn import sinkhorn_plan
from hf_moe_cpt.modeling import modeling_cpt_moe
from hf_moe_cpt.modeling.modeling_cpt_moe import plain_sinkhorn_plan
from tests.helpers.expert_layers import DEVICE, FLOAT_DTYPES
from tests.helpers.tolerances import assert_matches


@pytest.fixture
def many_small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five programs with tiles of two tokens: several tiles per program, several steps over the partial sums."""
    monkeypatch.setattr(sinkhorn, "MAX_PROGRAMS", 5)
    monkeypatch.setattr(sinkhorn, "MIN_TILE", 16)
    monkeypatch.setattr(sinkhorn, "MAX_TILE", 16)


def mask_of(tokens: int) -> torch.Tensor:
    """About a quarter is padding; the first token never is."""
    mask = torch.rand(tokens, device=DEVICE) < 0.75
    mask[0] = True
    return mask


def assert_close_to_definition(logits: torch.Tensor, passes: int, mask: torch.Tensor | None) -> None:
    got, want = sinkhorn_plan(logits, passes, mask), plain_sinkhorn_plan(logits.double(), passes, mask)
    assert got.dtype == torch.float32 and got.shape == logits.shape
    assert_matches("plan", got, want)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30)


@given(tokens=st.integers(1, 20), experts=st.integers(2, 40), passes=st.integers(0, 3), masked=st.booleans())
@example(tokens=1, experts=2, passes=3, masked=False)
@example(tokens=17, experts=256, passes=2, masked=True)
@example(tokens=9, experts=1, passes=1, masked=True)
@settings(max_examples=2, deadline=None)
def test_plan_equals_the_definition(tokens: int, experts: int, passes: int, masked: bool) -> None:
    logits = 2 * torch.randn(tokens, experts, device=DEVICE)
    assert_close_to_definition(logits, passes, mask_of(tokens) if masked else None)


def test_programs_add_up_to_the_same_plan(many_small_programs: None) -> None:
    assert sinkhorn.token_blocks(23, 5)[:3] == (2, 3, 4)
    assert_close_to_definition(torch.randn(23, 5, device=DEVICE), 3, mask_of(23))


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 31, 128])
def test_plan_of_a_large_batch_is_accurate(experts: int) -> None:
    assert_close_to_definition(torch.randn(32768, experts, device=DEVICE), 3, mask_of(32768))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_dtype_is_computed_in_fp32(dtype: torch.dtype) -> None:
    assert_close_to_definition(torch.randn(20, 6, device=DEVICE).to(dtype), 2, None)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_neither_overflow_nor_lose_the_plan(offset: float) -> None:
    logits = (30 * torch.randn(40, 7, device=DEVICE) + offset).float()
    plan = sinkhorn_plan(logits, 3, None)
    assert_matches("plan", plan, plain_sinkhorn_plan(logits.double(), 3))
    plan = sinkhorn_plan(logits.sort().values * 1e2, 3, None)
    assert torch.isfinite(plan).all() and (plan >= 0).all() and plan.sum() > 0


def test_padding_takes_no_part_and_alone_gives_zeros() -> None:
    logits, mask = torch.randn(33, 6, device=DEVICE), mask_of(33)
    mask[5] = False
    logits[~mask, 0] = float("nan")
    plan = sinkhorn_plan(logits, 3, mask)
    assert (plan[~mask] == 0).all()
    assert_matches("plan of the others", plan[mask], plain_sinkhorn_plan(logits[mask].double(), 3))
    mask = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    assert (sinkhorn_plan(torch.randn(9, 4, device=DEVICE), 2, mask) == 0).all()
    plan = sinkhorn_plan(torch.empty(0, 5, device=DEVICE), 3, None)
    assert plan.shape == (0, 5) and plan.dtype == torch.float32


def test_memory_layout_does_not_matter_and_runs_agree_bit_for_bit() -> None:
    logits, mask = torch.randn(5, 24, device=DEVICE).t(), mask_of(48)[::2]
    plan = sinkhorn_plan(logits, 3, mask)
    assert torch.equal(plan, sinkhorn_plan(logits.contiguous(), 3, mask.clone()))


@pytest.mark.parametrize(("experts", "dtype"), [(5, torch.float64), (sinkhorn.MAX_EXPERTS + 1, torch.float32)])
def test_what_the_kernels_do_not_serve_is_computed_plainly(experts: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, experts, dtype=dtype, device=DEVICE)
    assert torch.equal(sinkhorn_plan(logits, 3, None), plain_sinkhorn_plan(logits, 3))


def test_the_models_router_finds_the_operator_which_refuses_a_gradient() -> None:
    logits, mask = torch.randn(12, 4, device=DEVICE, requires_grad=True), mask_of(12)
    plan = modeling_cpt_moe.sinkhorn_plan(logits, 3, mask)
    assert torch.equal(plan, sinkhorn_plan(logits.detach(), 3, mask)) and not plan.requires_grad
    assert str(torch.ops.hf_moe_cpt.sinkhorn_plan.default._schema) == (
        "hf_moe_cpt::sinkhorn_plan(Tensor logits, int num_iterations, Tensor? token_mask) -> Tensor"
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sinkhorn_plan(logits, 1, None).sum().backward()


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.zeros(2, 3, 4), None, r"\(tokens, experts\), got \(2, 3, 4\)"),
        (torch.zeros(3, 0), None, r"got \(3, 0\)"),
        (torch.zeros(3, 4), torch.ones(2, dtype=torch.bool), r"\(3,\) torch.bool.*got \(2,\)"),
        (torch.zeros(3, 4), torch.ones(3), "got .* torch.float32"),
    ],
)
def test_wrong_arguments_are_refused(logits: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(logits, 1, mask)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_operator_keeps_the_rules_of_operators(masked: bool) -> None:
    torch.library.opcheck(sinkhorn_plan, (torch.randn(6, 5, device=DEVICE), 2, mask_of(6) if masked else None))


@pytest.mark.slow
@pytest.mark.compiles
def test_operator_compiles_into_one_graph() -> None:
    def heaviest(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.ops.hf_moe_cpt.sinkhorn_plan(2 * logits, 3, mask).argmax(dim=-1)

    logits, mask = torch.randn(17, 5, device=DEVICE), mask_of(17)
    compiled = torch.compile(heaviest, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, mask), heaviest(logits, mask))
