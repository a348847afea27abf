"""Parts, groups and scales against a brute-force sum over what each token sees; drawn values against statistics."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_moe_cpt.hub.upcycle_layout import ExpertLayout, plan_layout, router_rows
from hf_moe_cpt.hub.upcycle_weights import UpcycleOptions, changed, down_pieces, gate_up_pieces
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.routers_cpt_moe import ROUTER_CLASSES


H = 8


def weight_of_parts(config: CptMoeConfig, rows: torch.Tensor, layout: ExpertLayout) -> torch.Tensor:
    """How much of every part of the dense block 16 random tokens get: (16, G), by loops."""
    router = ROUTER_CLASSES[config.router_type](config).double().eval()
    router.weight.data = rows
    tokens = torch.randn(16, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, gates, index = router(tokens)
    total = torch.zeros(16, layout.num_parts, dtype=torch.float64)
    for token in range(16):
        for gate, expert in zip(gates[token].tolist(), index[token].tolist(), strict=True):
            total[token, layout.part_of_expert[expert]] += gate * layout.routed_scale
        for part in layout.shared_parts:
            total[token, part] += layout.shared_scale
    return total


@settings(max_examples=60, deadline=None)
@given(
    num_parts=st.integers(1, 6),
    rounds=st.integers(1, 3),
    shared=st.integers(0, 4),
    experts=st.integers(1, 24),
    normalised=st.booleans(),
    router_type=st.sampled_from(["softmax_topk", "sinkhorn"]),
)
def test_every_token_gets_every_part_once(
    num_parts: int, rounds: int, shared: int, experts: int, normalised: bool, router_type: str
) -> None:
    top_k = num_parts * rounds - shared
    assume(1 <= top_k <= experts and not (normalised and top_k == 1))
    config = CptMoeConfig(
        hidden_size=H,
        num_attention_heads=1,
        intermediate_size=num_parts * 4,
        moe_intermediate_size=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_shared_experts=shared,
        norm_topk_prob=normalised,
        router_type=router_type,
    )
    grouped = top_k % num_parts or experts % num_parts
    if num_parts > 1 and grouped and experts % top_k and experts < 2 * top_k:
        with pytest.raises(ValueError, match="is neither a multiple of"):
            plan_layout(config, num_parts * 4)
        return
    layout = plan_layout(config, num_parts * 4)
    std = 1.0 if layout.gates_are_exact else 1e-9
    rows = router_rows(layout, H, "noise", std, torch.Generator().manual_seed(1))
    total = weight_of_parts(config, rows, layout)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-7, atol=1e-7)


def test_pieces_are_the_parts_of_the_block() -> None:
    """Two parts of three columns, three experts: expert e has part e mod 2, and its output is scaled."""
    config = CptMoeConfig(
        hidden_size=2,
        num_attention_heads=1,
        intermediate_size=6,
        moe_intermediate_size=3,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=0,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    )
    layout = plan_layout(config, 6)
    gate, up = torch.arange(12.0).view(6, 2), -torch.arange(12.0).view(6, 2)
    down = torch.arange(12.0).view(2, 6)
    into = torch.cat(list(gate_up_pieces(gate, up, layout, UpcycleOptions(), 0)))
    out = torch.cat(list(down_pieces(down, layout, UpcycleOptions(), 0)))
    assert into.shape == (4, 6, 2) and out.shape == (4, 2, 3)
    for expert in range(4):
        part = slice(0, 3) if expert % 2 == 0 else slice(3, 6)
        assert torch.equal(into[expert], torch.cat((gate[part], up[part])))
        assert torch.equal(out[expert], 2 * down[:, part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropping_draws_the_same_dimensions_of_all_matrices_anew_and_keeps_the_rest(dtype: torch.dtype) -> None:
    width, options = 400, UpcycleOptions(drop_ratio=0.3)
    weight = (0.5 + 2 * torch.randn(width, 300)).to(dtype)
    new = {name: changed(weight, 0, name, options, 1, 2) for name in ("gate", "up")}
    new["down"] = changed(weight.T, 1, "down", options, 1, 2).T
    touched = {name: (value != weight).any(dim=1) for name, value in new.items()}
    assert touched["gate"].sum() == 120
    assert torch.equal(touched["gate"], touched["up"]) and torch.equal(touched["gate"], touched["down"])
    for value in new.values():
        fresh = value[touched["gate"]].double()
        assert value.dtype == dtype
        assert fresh.mean().item() == pytest.approx(0.5, abs=0.05)
        assert fresh.std().item() == pytest.approx(2.0, rel=0.02)
    assert not torch.equal(new["gate"], new["up"])
    other = changed(weight, 0, "gate", options, 1, 3)
    assert not torch.equal((other != weight).any(dim=1), touched["gate"])


def test_noise_is_a_multiple_of_the_matrix_s_own_deviation() -> None:
    weight = 3 * torch.randn(200, 300) + 1
    noise = changed(weight, 0, "up", UpcycleOptions(expert_noise=0.1), 0, 0) - weight
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)


def test_router_noise_gives_logits_of_the_deviation_asked_for() -> None:
    config = CptMoeConfig(num_experts=64, num_experts_per_tok=4, num_shared_experts=0, moe_intermediate_size=2816)
    rows = router_rows(plan_layout(config, 2816), 512, "noise", 0.25, torch.Generator().manual_seed(0))
    token = torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    token /= token.square().mean().sqrt()
    assert (rows @ token).std().item() == pytest.approx(0.25, rel=0.3)
