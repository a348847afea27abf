"""The presets are the paper's models: parameter counts on the meta device, and ratios that the tiny twins keep."""

import pytest
import torch

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM, CptMoeModel
from hf_moe_cpt.modeling.presets_cpt_moe import PRESETS
from tests.helpers.source_tree import PROJECT


# Millions, total and active: the paper's 570M and 2B, as its shapes work out.
COUNTS = {
    "dense-570m": (571.0, 571.0),
    "pb-granular-2b": (2025.1, 571.8),
    "sb-granular-2b": (2025.1, 571.8),
    "pb-switch-2b": (2024.5, 571.2),
    "sb-switch-2b": (2024.5, 571.2),
}


def on_meta(config: CptMoeConfig) -> CptMoeForCausalLM:
    with torch.device("meta"):
        return CptMoeForCausalLM(config)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_are_the_papers(preset: str) -> None:
    model = on_meta(CptMoeConfig.from_preset(preset))
    total, active = model.num_parameters(), model.num_parameters(only_active=True)
    assert (round(total / 1e6, 1), round(active / 1e6, 1)) == COUNTS[preset]


@pytest.mark.parametrize("preset", COUNTS)
def test_every_preset_has_a_tiny_twin_under_its_own_name_too(preset: str) -> None:
    short = preset.rpartition("-")[0] + "-tiny"
    assert CptMoeConfig.from_preset(f"{preset}-tiny").to_dict() == CptMoeConfig.from_preset(short).to_dict()


def test_active_parameters_are_those_of_one_forward_per_token() -> None:
    """Closed form, and the parent's other arguments still work."""
    config = CptMoeConfig.from_preset("pb-granular-tiny")
    model = on_meta(config)
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    unused = config.num_hidden_layers * (31 - 3) * one_expert
    embeddings = config.vocab_size * config.hidden_size
    assert model.num_parameters(only_active=True) == model.num_parameters() - unused
    assert model.num_parameters(only_active=True, exclude_embeddings=True) == (
        model.num_parameters() - unused - embeddings
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts.gate_up_proj" in name)
    up_of_active = config.num_hidden_layers * 3 * one_expert * 2 // 3
    assert model.num_parameters(only_active=True, only_trainable=True) == up_of_active


@pytest.mark.parametrize("preset", PRESETS)
def test_total_expert_width_is_eight_times_and_active_width_equal_to_the_dense_one(preset: str) -> None:
    config = CptMoeConfig.from_preset(preset)
    if not config.is_moe:
        assert (config.output_router_logits, config.router_aux_loss_coef, config.num_experts_per_tok) == (False, 0, 0)
        return
    per_token = config.num_experts_per_tok + config.num_shared_experts
    all_experts = config.num_experts + config.num_shared_experts
    assert per_token * config.moe_intermediate_size == config.intermediate_size
    assert all_experts * config.moe_intermediate_size == 8 * config.intermediate_size
    is_penalty_balanced = preset.startswith("pb-")
    assert config.has_router_penalty == config.output_router_logits == is_penalty_balanced
    assert config.router_type == ("softmax_topk" if is_penalty_balanced else "sinkhorn")


def test_tiny_twins_keep_the_shape_ratios() -> None:
    for preset in PRESETS:
        if preset.endswith("-tiny"):
            tiny = CptMoeConfig.from_preset(preset)
            full = CptMoeConfig.from_preset(preset.replace("-tiny", "-570m" if "dense" in preset else "-2b"))
            for name in ("num_experts", "num_experts_per_tok", "num_shared_experts", "router_type", "norm_topk_prob"):
                assert getattr(tiny, name) == getattr(full, name), (preset, name)
            assert tiny.intermediate_size / tiny.hidden_size == full.intermediate_size / full.hidden_size


def test_initialisation_is_small_init_and_wang_init() -> None:
    """Input matrices N(0, 2 / 5H), output projections N(0, 4 / (L^2 H)), norms 1; initializer_range replaces both."""
    config = CptMoeConfig.from_preset("pb-granular-tiny", hidden_size=256, num_hidden_layers=6)
    model = CptMoeModel(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.all(parameter == 1), name
            continue
        is_output = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        want = 2 / (6 * 256**0.5) if is_output else (2 / (5 * 256)) ** 0.5
        assert parameter.std().item() == pytest.approx(want, rel=0.05), name
    plain = CptMoeModel(CptMoeConfig.from_preset("dense-tiny", initializer_range=0.5))
    assert plain.layers[0].self_attn.o_proj.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_table_of_the_documentation_says_the_same() -> None:
    """Each preset's row of docs/models.md: total and active count, and the sizes behind them."""
    rows = {}
    for line in (PROJECT / "docs" / "models.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 13 and cells[0].startswith("`"):
            rows |= {name.strip("` "): cells[1:] for name in cells[0].split(",")}
    assert rows.keys() == PRESETS.keys()
    for preset, cells in rows.items():
        config = CptMoeConfig.from_preset(preset)
        model = on_meta(config)
        counts = [f"{n / 1e6:.1f}" for n in (model.num_parameters(), model.num_parameters(only_active=True))]
        experts = [config.num_experts, config.num_experts_per_tok, config.num_shared_experts]
        widths = [config.moe_intermediate_size if config.is_moe else "-"]
        widths += ["-" if config.is_moe else config.intermediate_size]
        sizes = [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, f"{config.vocab_size:,}"]
        expected = [
            *counts,
            *(experts if config.is_moe else ["-"] * 3),
            *widths,
            *sizes,
            config.max_position_embeddings,
        ]
        assert cells == [str(value) for value in expected], preset
