"""The configuration derives what is left unset, refuses contradictions in one line and survives a round trip.

The presets are the paper's models: parameter counts on the meta device, and ratios that the tiny twins keep.
"""

import copy
import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from hf_moe_cpt.modeling.configuration_cpt_moe import AUTO_MAP, PRESETS, CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM, CptMoeModel
from tests.helpers.source_tree import PROJECT


TINY = "pb-granular-tiny"
REFUSED = {
    "K above E": ({"num_experts_per_tok": 32, "moe_intermediate_size": 8}, "num_experts_per_tok=32 must lie in 1..31"),
    "K of 0": ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie in"),
    "expert width": ({"intermediate_size": 353}, "intermediate_size=353 is not divisible by 4"),
    "expert width of 0": ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
    "head width": ({"hidden_size": 130}, r"hidden_size=130 is not divisible by 4 \(num_attention_heads\)"),
    "odd rotation": ({"head_dim": 28}, "head_dim=28 x partial_rotary_factor=0.25 rotates 7 dimensions"),
    "no rotation": ({"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0 rotates 0 dimensions"),
    "grouped heads": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
    "router": (
        {"router_type": "softmax"},
        "router_type='softmax' is unknown: choose one of softmax_topk, sinkhorn, bias_topk",
    ),
    "norm": ({"norm_type": "batchnorm"}, "norm_type='batchnorm' is unknown"),
    "query-key norm": ({"qk_norm": "heads"}, "qk_norm='heads' is unknown: choose one of head, projection, or None"),
    "two kinds of bias": (
        {"attention_bias": True, "qkv_bias": True},
        "attention_bias=True has all biases of qkv_bias=True, .*: set one of the two",
    ),
    "empty window": ({"sliding_window": 0}, "sliding_window=0 must be at least 1, or None for no window"),
    "load scope": ({"load_scope": "node"}, "load_scope='node' is unknown: choose one of global, rank"),
    "gate of one": ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "every gate 1, so the router gets no grad"),
    "sinkhorn with aux": ({"router_type": "sinkhorn"}, "router_aux_loss_coef=0.01 with router_type='sinkhorn'"),
    "negative coefficient": ({"router_z_loss_coef": -0.1}, "router_z_loss_coef=-0.1 must be at least 0"),
    "no passes": ({"sinkhorn_iterations": 0}, "sinkhorn_iterations=0 must be at least 1"),
    "vocabulary": ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    "dense, aux": (
        {"router_aux_loss_coef": 0.01},
        "router_aux_loss_coef=0.01, output_router_logits=True: a dense model",
    ),
    "dense, experts": ({"num_experts_per_tok": 2}, "num_experts_per_tok=2: a dense model"),
    "dense, router": ({"router_type": "sinkhorn"}, "router_type='sinkhorn': a dense model"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        CptMoeConfig.from_preset("dense-tiny" if "a dense model" in message else TINY, **overrides)
    assert "\n" not in str(refusal.value)


def test_presets_and_their_overrides_must_exist_and_have_their_types() -> None:
    """And a field that is set later is checked when the model is built."""
    with pytest.raises(ValueError, match="preset='pb-granular' is unknown: choose one of dense-570m, pb-granular-2b"):
        CptMoeConfig.from_preset("pb-granular")
    with pytest.raises(ValueError, match="num_expert: no such field of CptMoeConfig"):
        CptMoeConfig.from_preset(TINY, num_expert=4)
    with pytest.raises(StrictDataclassFieldValidationError, match="num_experts"):
        CptMoeConfig.from_preset(TINY, num_experts="31")
    config = CptMoeConfig.from_preset(TINY)
    config.num_experts_per_tok = 40
    with pytest.raises(ValueError, match="num_experts_per_tok=40 must lie in 1..31"):
        CptMoeForCausalLM(config)


def test_unset_fields_follow_from_the_others() -> None:
    config = CptMoeConfig.from_preset(TINY, intermediate_size=400, num_experts_per_tok=7)
    assert (config.moe_intermediate_size, config.head_dim, config.num_key_value_heads) == (50, 32, 4)
    dense = CptMoeConfig(num_experts=0)
    assert (dense.num_experts_per_tok, dense.num_shared_experts, dense.moe_intermediate_size) == (0, 0, None)
    assert (dense.router_aux_loss_coef, dense.router_z_loss_coef, dense.output_router_logits) == (0, 0, False)
    assert CptMoeConfig().to_dict() == CptMoeConfig.from_preset("pb-granular-2b").to_dict()


@pytest.fixture
def warnings_of_transformers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """caplog sees what transformers logs only if its root logger hands messages on."""
    monkeypatch.setattr(transformers_logging._get_library_root_logger(), "propagate", True)
    ours = logging.getLogger("hf_moe_cpt.modeling.configuration_cpt_moe")
    monkeypatch.setattr(ours, "level", logging.WARNING)
    return caplog


def test_unknown_keys_are_named_once(warnings_of_transformers: pytest.LogCaptureFixture) -> None:
    CptMoeConfig(num_expert=4, router_z_loss=0.1)
    messages = [record.getMessage() for record in warnings_of_transformers.records]
    assert [m for m in messages if "does not know num_expert, router_z_loss" in m] == messages


ROUND_TRIPS = {preset: (preset, {"partial_rotary_factor": 0.5, "num_labels": 3}) for preset in PRESETS} | {
    "biases, norms of heads": ("pb-switch-tiny", {"qkv_bias": True, "qk_norm": "head", "num_key_value_heads": 2}),
    "norms of projections": ("pb-switch-tiny", {"attention_bias": True, "qk_norm": "projection"}),
    "window": ("pb-switch-tiny", {"sliding_window": 4}),
}


@pytest.mark.parametrize(("preset", "fields"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_round_trip_changes_nothing_and_warns_of_nothing(
    preset: str, fields: dict, tmp_path, warnings_of_transformers: pytest.LogCaptureFixture
) -> None:
    config = CptMoeConfig.from_preset(preset, **fields)
    config.save_pretrained(tmp_path)
    assert not [key for key in json.loads((tmp_path / "config.json").read_text()) if key.endswith("_plan")]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CptMoeConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.base_model_tp_plan == config.base_model_tp_plan
    assert loaded.rope_parameters["partial_rotary_factor"] == fields.get("partial_rotary_factor", 0.25)
    assert [record.getMessage() for record in warnings_of_transformers.records] == []


def test_a_configuration_that_never_heard_of_biases_norms_and_windows_has_none(tmp_path) -> None:
    config = CptMoeConfig.from_preset(TINY)
    config.save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    names = ("attention_bias", "qkv_bias", "qk_norm", "sliding_window")
    assert [old.pop(name) for name in names] == [False, False, None, None]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_the_callers_rope_dictionary_is_left_alone() -> None:
    rope = {"rope_type": "default", "rope_theta": 5_000.0}
    given = copy.deepcopy(rope)
    config = CptMoeConfig.from_preset(TINY, rope_parameters=rope)
    assert rope == given
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5_000.0, "partial_rotary_factor": 0.25}


def test_saving_names_the_files_saved_here_whatever_repository_it_came_from(tmp_path) -> None:
    elsewhere = {head: f"someone/else--{file}" for head, file in AUTO_MAP.items()}
    config = CptMoeConfig(auto_map=elsewhere)
    assert config.auto_map == elsewhere
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_cpt_moe.py"}


def on_meta(config: CptMoeConfig) -> CptMoeForCausalLM:
    with torch.device("meta"):
        return CptMoeForCausalLM(config)


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


def test_tiny_twins_keep_the_shape_ratios() -> None:
    for preset in PRESETS:
        if preset.endswith("-tiny"):
            tiny = CptMoeConfig.from_preset(preset)
            name = preset.replace("-tiny", "-570m" if "dense" in preset else "-2b")
            assert CptMoeConfig.from_preset(f"{name}-tiny").to_dict() == tiny.to_dict()
            full = CptMoeConfig.from_preset(name)
            is_penalty_balanced = preset.startswith("pb-")
            assert tiny.has_router_penalty == tiny.output_router_logits == is_penalty_balanced
            assert not tiny.is_moe or (tiny.router_type == "softmax_topk") == is_penalty_balanced
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
        experts = [*experts, config.moe_intermediate_size, "-"] if config.is_moe else ["-"] * 4
        widths = [] if config.is_moe else [config.intermediate_size]
        sizes = [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, f"{config.vocab_size:,}"]
        expected = [*counts, *experts, *widths, *sizes, config.max_position_embeddings]
        assert cells == [str(value) for value in expected], preset
