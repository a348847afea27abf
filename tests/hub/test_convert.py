"""Converted checkpoints give the logits of transformers' own models, both ways; what cannot is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_cpt.hub.convert import FAMILIES, check_servable, config_to, convert
from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.scripts.convert import main
from tests.helpers.hub_checkpoints import LLAMA3_ROPE, biased, fingerprint, logits_of, model_of, saved
from tests.helpers.tolerances import assert_matches


FULL_ROTATION = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
OURS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_shared_experts": 0}
OURS |= {"norm_topk_prob": True, "rope_parameters": FULL_ROTATION}


def tensor_names(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def theirs_of(model_type: str, **changes: object) -> torch.nn.Module:
    """A model of transformers with biases that matter; the gate on the shared expert of a Qwen2-MoE does nothing."""
    model = biased(model_of(model_type, **changes))
    for name, weight in model.named_parameters():
        if "shared_expert_gate" in name:
            torch.nn.init.zeros_(weight)
    return model


GROUPED = {"num_key_value_heads": 1, "norm_topk_prob": True, "attention_bias": True}
TIED = {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1, "head_dim": 12}
TO_OURS = {
    "mixtral, grouped heads of another size, tied, llama3 rope": ("mixtral", TIED),
    "mixtral, window, tanh gelu": ("mixtral", {"sliding_window": 5, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, normalised, biases": ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": True}),
    "qwen2_moe, one expert": ("qwen2_moe", {"num_experts_per_tok": 1}),
    "olmoe": ("olmoe", {}),
    "olmoe, grouped, biases, normalised": ("olmoe", GROUPED),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, and window": ("qwen3_moe", {**GROUPED, "use_sliding_window": True, "sliding_window": 5}),
}


@pytest.mark.parametrize("case", TO_OURS)
def test_what_came_from_transformers_keeps_its_logits(case: str, tmp_path: Path) -> None:
    model_type, changes = TO_OURS[case]
    model = theirs_of(model_type, **changes)
    source = saved(model, tmp_path / "theirs", max_shard_size=10_000)
    before = fingerprint(source)
    made = convert(source, tmp_path / "ours", "cpt_moe", max_shard_size=20_000)
    assert made.config.model_type == "cpt_moe"
    assert_matches(case, logits_of(tmp_path / "ours"), logits_of(model))
    assert fingerprint(source) == before


HALF = {**FULL_ROTATION, "partial_rotary_factor": 0.5}
SINKHORN, SHARED_HEADS = {"router_type": "sinkhorn"}, {"num_key_value_heads": 1, "tie_word_embeddings": True}
FROM_OURS = {
    "mixtral, trained by a Sinkhorn plan, grouped, tied": ("mixtral", SINKHORN | SHARED_HEADS),
    "mixtral, heads of another size, window": ("mixtral", {"head_dim": 12, "sliding_window": 5}),
    "qwen2_moe without shared experts, biases": ("qwen2_moe", {"qkv_bias": True}),
    "qwen2_moe, two shared experts": ("qwen2_moe", {"num_shared_experts": 2, "norm_topk_prob": False}),
    "qwen2_moe, switch": ("qwen2_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "olmoe": ("olmoe", {"qk_norm": "projection"}),
    "olmoe, grouped, biases, raw gates": ("olmoe", {**GROUPED, "qk_norm": "projection", "norm_topk_prob": False}),
    "qwen3_moe, heads of another size": ("qwen3_moe", {"qk_norm": "head", "head_dim": 12}),
    "qwen3_moe, biases, window": ("qwen3_moe", {"qk_norm": "head", "attention_bias": True, "sliding_window": 5}),
}


@pytest.mark.parametrize("case", FROM_OURS)
def test_ours_keeps_its_logits_there_and_every_bit_when_it_comes_back(case: str, tmp_path: Path) -> None:
    to, changes = FROM_OURS[case]
    model = biased(model_of("cpt_moe", **{**OURS, **changes}))
    saved(model, tmp_path / "ours")
    made = convert(tmp_path / "ours", tmp_path / "theirs", to, max_shard_size=10_000)
    assert AutoConfig.from_pretrained(tmp_path / "theirs").model_type == to
    assert_matches(case, logits_of(tmp_path / "theirs"), logits_of(model))
    assert any("Sinkhorn" in note for note in made.notes) == ("Sinkhorn" in case)
    convert(tmp_path / "theirs", tmp_path / "back", "cpt_moe")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())
    assert_matches(f"{case}, back", logits_of(tmp_path / "back"), logits_of(model))


PARTLY = {"rope_parameters": HALF}
NO_EXPERTS = dict.fromkeys(("num_experts_per_tok", "num_shared_experts", "moe_intermediate_size"))
NO_EXPERTS |= {"num_experts": 0, "norm_topk_prob": False}
RAW_SWITCH = {"num_experts_per_tok": 1, "norm_topk_prob": False}
ONE_WAY = {
    "qwen2_moe, a part of each head rotated": ("qwen2_moe", PARTLY | {"qkv_bias": True, "num_shared_experts": 1}),
    "olmoe, a part of each head rotated": ("olmoe", PARTLY | {"qk_norm": "projection", "num_key_value_heads": 1}),
    "qwen3_moe, a part of each head rotated": ("qwen3_moe", PARTLY | {"qk_norm": "head", "head_dim": 12}),
    "glm4_moe, balanced by a bias": ("glm4_moe", PARTLY | {"router_type": "bias_topk", "num_shared_experts": 1}),
    "glm4_moe, sigmoid switch": ("glm4_moe", RAW_SWITCH | SINKHORN),
    "llama, a part of each head rotated": ("llama", NO_EXPERTS | PARTLY | SHARED_HEADS | {"attention_bias": True}),
    "mistral": ("mistral", NO_EXPERTS | {"sliding_window": 5, "hidden_act": "silu"}),
    "qwen2": ("qwen2", NO_EXPERTS | {"qkv_bias": True}),
    "qwen3": ("qwen3", NO_EXPERTS | {"qk_norm": "head", "head_dim": 12}),
}


@pytest.mark.parametrize("case", ONE_WAY)
def test_ours_keeps_its_logits_in_families_that_rotate_whole_heads_have_sigmoid_gates_or_are_dense(
    case: str, tmp_path: Path
) -> None:
    to, changes = ONE_WAY[case]
    model = biased(model_of("cpt_moe", **{**OURS, **changes}))
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(bias, -0.5, 0.5)
    saved(model, tmp_path / "ours")
    made = convert(tmp_path / "ours", tmp_path / "theirs", to, max_shard_size=10_000)
    # Frequencies of longrope are products of two roundings, and an angle is up to 20 of them.
    limit = 2e-5 if "rotated" in case else None
    assert_matches(case, logits_of(tmp_path / "theirs"), logits_of(model), limit)
    assert any("SiLU" in obstacle for obstacle in made.obstacles) == (case != "mistral")
    assert any("longrope" in obstacle for obstacle in made.obstacles) == ("rotated" in case)


SERVED_AS = {"dense": "llama", "pb-granular": "qwen2_moe", "sb-granular": "qwen2_moe", "lf-granular": "glm4_moe"}
SERVED_AS |= {"pb-switch": "qwen2_moe", "sb-switch": "glm4_moe"}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_family_and_silu_ones_are_right_in_every_server(preset: str) -> None:
    config = CptMoeConfig.from_preset(preset)
    to = SERVED_AS["-".join(preset.split("-")[: 1 if preset.startswith("dense") else 2])]
    assert config_to(config, to).model_type == to
    if to == "glm4_moe":
        assert config_to(config, to).head_dim == config.head_dim  # vLLM 0.25 ends without it
    if preset.endswith("-silu"):
        check_servable(config, to)
    else:
        with pytest.raises(ValueError, match=f"--serve_as {to}: hidden_act='gelu': llama.cpp and vLLM"):
            check_servable(config, to)


def test_gates_and_heads_that_llama_cpp_takes_for_the_others_are_told_before_training() -> None:
    for to, norm, changes in (("qwen2_moe", True, {}), ("olmoe", True, {"qk_norm": "projection"})):
        fields = {"num_shared_experts": 0, "num_experts_per_tok": 4, **changes}
        config = CptMoeConfig.from_preset("pb-granular-tiny-silu", norm_topk_prob=norm, **fields)
        with pytest.raises(ValueError, match=f"--serve_as {to}: norm_topk_prob={norm}: llama.cpp runs every {to} as"):
            check_servable(config, to)
        config.norm_topk_prob = not norm
        check_servable(config, to)
        config.tie_word_embeddings = True
        with pytest.raises(ValueError, match="llama.cpp loads no"):
            check_servable(config, to)


def test_a_shared_expert_has_a_gate_whose_sigmoid_is_a_half_and_that_is_not_zero(tmp_path: Path) -> None:
    """llama.cpp computes sigmoid(x) as silu(x) / x."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        saved(model_of("cpt_moe", **OURS | {"num_shared_experts": 1}).to(dtype), tmp_path / f"ours-{dtype}")
        convert(tmp_path / f"ours-{dtype}", tmp_path / f"theirs-{dtype}", "qwen2_moe")
        weights = load_file(tmp_path / f"theirs-{dtype}" / "model.safetensors")
        logit = weights["model.layers.0.mlp.shared_expert_gate.weight"].sum()
        assert (torch.nn.functional.silu(logit.float()) / logit.float()).item() == pytest.approx(0.5, rel=1e-4)
        assert torch.equal(logit.sigmoid(), torch.full_like(logit, 0.5))


@pytest.mark.parametrize("to", FAMILIES)
def test_the_files_hold_the_names_that_transformers_itself_writes(to: str, tmp_path: Path) -> None:
    norm = {"olmoe": "projection", "qwen3_moe": "head"}.get(to)
    changes = OURS | ({"router_type": "bias_topk"} if to == "glm4_moe" else {})
    saved(model_of("cpt_moe", **changes, qk_norm=norm), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to)
    number = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}.get(to, "num_experts")
    theirs = model_of(to, **{number: 6}, **({"first_k_dense_replace": 0} if to == "glm4_moe" else {}))
    assert tensor_names(tmp_path / "theirs") == tensor_names(saved(theirs, tmp_path / "original"))


def test_the_balance_penalty_keeps_its_size_for_uniform_routing(tmp_path: Path) -> None:
    """Theirs is coefficient x K when routing is uniform, ours coefficient x layers."""
    saved(model_of("mixtral", router_aux_loss_coef=0.02, output_router_logits=True), tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "ours", "cpt_moe").config
    assert ours.router_aux_loss_coef * 2 == pytest.approx(0.02 * 2)
    assert ours.output_router_logits and ours.router_z_loss_coef == 0
    back = convert(tmp_path / "ours", tmp_path / "back", "mixtral").config
    assert back.router_aux_loss_coef == pytest.approx(0.02)


def test_what_training_will_do_otherwise_is_said_and_foreign_families_need_two_steps(tmp_path: Path) -> None:
    saved(model_of("mixtral", router_jitter_noise=0.1), tmp_path / "jitter")
    notes = convert(tmp_path / "jitter", tmp_path / "calm", "cpt_moe").notes
    assert notes == ("router_jitter_noise=0.1 has no counterpart",)
    with pytest.raises(ValueError, match="mixtral to qwen2_moe: one side must be cpt_moe; convert to it first"):
        convert(tmp_path / "jitter", tmp_path / "other", "qwen2_moe")


HALF_LINEAR = {**HALF, "rope_type": "linear", "factor": 2.0}
REFUSED_FROM_OURS = {
    "shared": ("mixtral", {"num_shared_experts": 1}, "num_shared_experts=1: mixtral has none; try qwen2_moe"),
    "gates": ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False: mixtral divides gates by their sum"),
    "norm": ("mixtral", {"norm_type": "layernorm"}, "norm_type='layernorm': mixtral has RMSNorm"),
    "rotation": (
        "qwen2_moe",
        {"rope_parameters": HALF_LINEAR},
        "partial_rotary_factor=0.5 with rope_type='linear': q",
    ),
    "sigmoid": ("qwen2_moe", RAW_SWITCH | SINKHORN, "router_type='sinkhorn' with .*: qwen2_moe has no sigmoid gates"),
    "heads": ("qwen2_moe", {"head_dim": 12}, "head_dim=12: qwen2_moe has heads of .* = 8"),
    "norm that they lack": ("qwen2_moe", {"qk_norm": "head"}, "qk_norm='head' normalises each .*, qwen2_moe neither"),
    "norm that we lack": ("olmoe", {}, "qk_norm=None normalises neither queries nor keys, olmoe all heads of queries"),
    "other norm": ("olmoe", {"qk_norm": "head"}, "qk_norm='head' normalises each head of queries and keys, olmoe all"),
    "no biases": ("mixtral", {"qkv_bias": True}, "qkv_bias=True: of biases, the attention of mixtral can have none"),
    "other biases": (
        "qwen2_moe",
        {"attention_bias": True},
        "attention_bias=True: .* can have those of qkv_bias alone",
    ),
    "window": (
        "olmoe",
        {"qk_norm": "projection", "sliding_window": 5},
        "sliding_window=5: olmoe has no window for all",
    ),
    "dense": (
        "mixtral",
        NO_EXPERTS,
        "num_experts=0: a dense model has no place in mixtral; choose one of llama, mist",
    ),
    "dense without the biases of the family": ("qwen2", NO_EXPERTS, "qkv_bias=False: qwen2 always has these biases"),
    "mixture": ("llama", {}, "num_experts=6: llama is dense; choose another family"),
    "softmax": ("glm4_moe", {}, "router_type='softmax_topk' with .*: glm4_moe has no softmax gates; try qwen2_moe"),
    "itself": ("cpt_moe", {}, "is of type 'cpt_moe': only mixtral, olmoe, qwen2_moe, qwen3_moe, cpt_moe convert"),
    "unknown": (
        "gpt2",
        {},
        "--to 'gpt2' is unknown: choose one of mixtral, olmoe, qwen2_moe, qwen3_moe, cpt_moe, glm4",
    ),
}

WINDOW = {"use_sliding_window": True, "sliding_window": 16}
REFUSED_TO_OURS = {
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: olmoe clips queries, keys and values, and cpt_moe does"),
    "window of some layers": ("qwen2_moe", WINDOW, "attends in some layers to the last 16 of 64 tokens and in others"),
    "one expert": ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 and normalised gates"),
    "shared gate": ("qwen2_moe", {}, "shared_expert_gate.weight weighs the shared expert by the token"),
    "dense layers": ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] .* mixes dense layers"),
    "dense layers, qwen3": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 mixes dense layers"),
    "family": ("llama", {}, "is of type 'llama': only mixtral"),
}


@pytest.mark.parametrize("case", [*REFUSED_FROM_OURS, *REFUSED_TO_OURS])
def test_what_the_other_side_cannot_compute_is_refused(case: str, tmp_path: Path) -> None:
    if case in REFUSED_FROM_OURS:
        to, changes, message = REFUSED_FROM_OURS[case]
        saved(model_of("cpt_moe", **{**OURS, **changes}), tmp_path / "source")
    else:
        (model_type, changes, message), to = REFUSED_TO_OURS[case], "cpt_moe"
        saved(model_of(model_type, **changes), tmp_path / "source")
    with pytest.raises(ValueError, match=message) as refusal:
        convert(tmp_path / "source", tmp_path / "target", to)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_without_a_place_and_widths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved(theirs_of("qwen2_moe", qkv_bias=True), tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "config.json").read_text())
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config | {"qkv_bias": False}))
    with pytest.raises(ValueError, match="layers.0.self_attn.k_proj.bias cannot be carried over .*no such bias"):
        convert(tmp_path / "biased", tmp_path / "ours", "cpt_moe")
    saved(theirs_of("qwen2_moe", shared_expert_intermediate_size=12), tmp_path / "wide")
    with pytest.raises(ValueError, match="shared_expert_intermediate_size=12 is no multiple of"):
        convert(tmp_path / "wide", tmp_path / "ours", "cpt_moe")


def test_the_command_says_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(model_of("cpt_moe", **OURS), tmp_path / "ours")
    main([str(tmp_path / "ours"), "--to", "mixtral", "--output_dir", str(tmp_path / "theirs")])
    printed = capsys.readouterr().out
    assert "theirs: mixtral, the same logits" in printed
    assert "trained further, it differs: router_z_loss_coef=0.001 has no counterpart" in printed
