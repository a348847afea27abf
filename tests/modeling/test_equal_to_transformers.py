"""With equal weights, models of the family compute what models of transformers compute: logits and every gradient.

Each case pairs a preset of ours with a model nobody here wrote and says how names and values of weights correspond.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    StableLmForCausalLM,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import assert_matches, relative_rms_error


SIZE = {"vocab_size": 512, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
FULL_ROTATION = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
QUARTER_ROTATION = FULL_ROTATION | {"partial_rotary_factor": 0.25}
SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps rope_parameters"
).split()


def qwen2_name(name: str) -> str | None:
    """Qwen2-MoE also has biases (set to 0) and a gate on its shared expert (set to 0: a constant factor of 1/2)."""
    if name.endswith(".bias") or "shared_expert_gate" in name:
        return None
    return name.replace("shared_expert.", "shared_experts.")


@dataclass(frozen=True)
class Twin:
    """A preset of ours and its twin, a model class of transformers.

    more: fields of the twin's configuration beside SHARED_FIELDS: their name -> the name of ours, or a value.
    our_name: twin's parameter name -> ours, None if ours has no such parameter.
    scale: twin's value = scale(name) x ours; a gradient of ours is then that multiple of the twin's.
    """

    preset: str
    overrides: dict
    model: type[PreTrainedModel]
    more: dict = field(default_factory=dict)
    our_name: Callable[[str], str | None] = lambda name: name
    scale: Callable[[str], float] = lambda name: 1.0

    def config(self) -> CptMoeConfig:
        rotation = {"rope_parameters": FULL_ROTATION}
        return CptMoeConfig.from_preset(self.preset, **{**SIZE, **rotation, **self.overrides})

    def twin(self, config: CptMoeConfig) -> PreTrainedModel:
        fields = {name: getattr(config, name) for name in SHARED_FIELDS}
        fields |= {theirs: getattr(config, ours) for theirs, ours in self.more.items() if isinstance(ours, str)}
        fields |= {theirs: value for theirs, value in self.more.items() if not isinstance(value, str)}
        return self.model(self.model.config_class(**fields | {"rope_parameters": dict(fields["rope_parameters"])}))


def same(*names: str) -> dict[str, str]:
    """Fields that the twin calls as we do."""
    return dict(zip(names, names, strict=True))


EXPERTS = same("num_experts", "num_experts_per_tok")
GATED = EXPERTS | same("moe_intermediate_size", "norm_topk_prob")
TWO_GROUPS = {"num_key_value_heads": 2}
TWINS = {
    "dense = Llama": Twin("dense-tiny", {}, LlamaForCausalLM),
    "biases on all of attention = Llama": Twin(
        "dense-tiny", {"attention_bias": True}, LlamaForCausalLM, same("attention_bias")
    ),
    "window = Mistral": Twin(
        "dense-tiny", {"sliding_window": 7, **TWO_GROUPS}, MistralForCausalLM, same("sliding_window")
    ),
    "biases = Qwen2": Twin("dense-tiny", {"qkv_bias": True, **TWO_GROUPS}, Qwen2ForCausalLM),
    "norms of heads, heads of another size = Qwen3": Twin(
        "dense-tiny", {"qk_norm": "head", "head_dim": 48, **TWO_GROUPS}, Qwen3ForCausalLM, same("head_dim")
    ),
    "norms of projections = OLMoE": Twin(
        "pb-switch-tiny",
        {"qk_norm": "projection", "num_experts_per_tok": 2, **TWO_GROUPS},
        OlmoeForCausalLM,
        EXPERTS | {"intermediate_size": "moe_intermediate_size"},
    ),
    "norms of heads, experts = Qwen3-MoE": Twin(
        "pb-switch-tiny",
        {"qk_norm": "head", "head_dim": 48, "num_experts_per_tok": 2, "norm_topk_prob": True, **TWO_GROUPS},
        Qwen3MoeForCausalLM,
        GATED | same("head_dim"),
    ),
    "layernorm, 1/4 rotation = StableLM": Twin(
        "dense-tiny",
        {"norm_type": "layernorm", "rope_parameters": QUARTER_ROTATION},
        StableLmForCausalLM,
        {"layer_norm_eps": "rms_norm_eps"},
    ),
    "granular = Qwen2-MoE": Twin(
        "pb-granular-tiny",
        {},
        Qwen2MoeForCausalLM,
        GATED | {"shared_expert_intermediate_size": "moe_intermediate_size"},
        qwen2_name,
        lambda name: 2.0 if "shared_expert.down_proj" in name else 1.0,
    ),
    "switch = Qwen2-MoE with K = 1": Twin(
        "pb-switch-tiny",
        {},
        Qwen2MoeForCausalLM,
        GATED | {"shared_expert_intermediate_size": "moe_intermediate_size"},
        lambda name: None if "shared_expert" in name else qwen2_name(name),
    ),
    "normalised gates = Mixtral": Twin(
        "pb-switch-tiny",
        {"num_experts_per_tok": 2, "norm_topk_prob": True},
        MixtralForCausalLM,
        {"intermediate_size": "moe_intermediate_size", "sliding_window": None, "num_local_experts": "num_experts"}
        | same("num_experts_per_tok"),
    ),
}


def build(case: Twin) -> tuple[CptMoeForCausalLM, PreTrainedModel]:
    """Both models in training mode, eager, with the same weights; what only the twin has is 0."""
    config = case.config()
    ours, twin = CptMoeForCausalLM(config).train(), case.twin(config).train()
    for model in (ours, twin):
        model.set_attn_implementation("eager")
        if config.is_moe:
            model.set_experts_implementation("eager")
    values = dict(ours.named_parameters())
    with torch.no_grad():
        values["lm_head.weight"].mul_(4)  # logits and gradients of a size that shows errors
        for name, value in values.items():  # biases of 0 and norms of 1 say nothing about where they went
            if value.dim() == 1:
                value.uniform_(-0.5, 0.5).add_(0.0 if name.endswith("bias") else 1.0)
        for name, parameter in twin.named_parameters():
            mapped = case.our_name(name)
            parameter.copy_(torch.zeros_like(parameter) if mapped is None else case.scale(name) * values[mapped])
    mapped_names = {case.our_name(name) for name, _ in twin.named_parameters()} - {None}
    assert mapped_names == set(values), "a parameter of ours has no twin"
    return ours, twin


def equality_figures(case: Twin) -> dict[str, float]:
    """Relative RMS error of the logits, the loss and every gradient, by name."""
    ours, twin = build(case)
    tokens = torch.randint(0, SIZE["vocab_size"], (2, 24))
    ours_out = ours(input_ids=tokens, labels=tokens, output_router_logits=False)
    twin_out = twin(input_ids=tokens, labels=tokens)
    ours_out.loss.backward()
    twin_out.loss.backward()
    figures = {
        "logits": relative_rms_error(ours_out.logits, twin_out.logits),
        "loss": relative_rms_error(ours_out.loss, twin_out.loss),
    }
    our_parameters = dict(ours.named_parameters())
    for name, parameter in twin.named_parameters():
        mapped = case.our_name(name)
        if mapped is not None:
            figures[mapped] = relative_rms_error(our_parameters[mapped].grad, case.scale(name) * parameter.grad)
    return figures


@pytest.mark.parametrize("case", TWINS.values(), ids=TWINS)
def test_logits_and_every_gradient_equal_the_twin(case: Twin) -> None:
    wrong = {name: error for name, error in equality_figures(case).items() if not error <= 2e-6}
    assert not wrong, f"relative RMS error above fp32 rounding: {wrong}"


def test_sinkhorn_models_evaluate_as_penalty_balanced_ones() -> None:
    balanced = CptMoeForCausalLM(CptMoeConfig.from_preset("pb-granular-tiny", **SIZE)).eval()
    sinkhorn = CptMoeForCausalLM(CptMoeConfig.from_preset("sb-granular-tiny", **SIZE)).eval()
    sinkhorn.load_state_dict(balanced.state_dict())
    tokens = torch.randint(0, SIZE["vocab_size"], (1, 16))
    assert torch.equal(balanced(tokens).logits, sinkhorn(tokens).logits)
    balanced.train(), sinkhorn.train()
    assert not torch.equal(balanced(tokens).logits, sinkhorn(tokens).logits)


def test_an_auxiliary_loss_per_layer_equals_transformers_up_to_its_missing_division_by_k() -> None:
    model = CptMoeForCausalLM(CptMoeConfig.from_preset("pb-granular-tiny", **SIZE)).eval()
    tokens = torch.randint(0, SIZE["vocab_size"], (2, 32))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    out = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
    want = sum(load_balancing_loss_func((layer,), 31, 3, mask) / 3 for layer in out.router_logits)
    assert_matches("aux_loss", out.aux_loss, want)
