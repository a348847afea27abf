"""Configuration of the `cpt_moe` family, and as presets the paper's five models, one more, and a tiny twin of each.

A Llama-like decoder with dense or mixture-of-experts feed-forward blocks; E = routed experts, K = routed experts per
token. Sources: arXiv 2503.05029 (architecture, routers, penalties; sizes in section 4, embedding and attention shapes
follow from its 570M and 2B parameters); where the paper is silent the defaults are those of its authors' training code
(GPT-NeoX), see docs/models.md.
"""

import os
import re

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

ROUTER_TYPES = ("softmax_topk", "sinkhorn", "bias_topk")
NORM_TYPES = ("rmsnorm", "layernorm")
QK_NORMS = ("head", "projection")
LOAD_SCOPES = ("global", "rank")
PADDED_SHARD = "cpt_moe_padded_experts"  # transformers' own "grouped_gemm" refuses what it cannot deal evenly

# Every Auto class that a saved checkpoint answers to, and the file beside the weights that holds the class.
AUTO_MAP = {
    "AutoConfig": "configuration_cpt_moe.CptMoeConfig",
    "AutoModel": "modeling_cpt_moe.CptMoeModel",
    "AutoModelForCausalLM": "modeling_cpt_moe.CptMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cpt_moe.CptMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_cpt_moe.CptMoeForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_cpt_moe.CptMoeForQuestionAnswering",
}

# A norm over one head holds on every shard; one over the whole projection needs all heads, so they are gathered.
_TP_PLAN_OF_QK_NORM = {
    "head": dict.fromkeys(
        ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"), "replicated_with_grad_allreduce"
    ),
    "projection": {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
    },
}

# Keys that are no field here but that transformers itself writes into config.json or passes to a configuration.
_KEYS_OF_TRANSFORMERS = frozenset(
    "model_type auto_map name_or_path num_labels torch_dtype rope_theta rope_scaling partial_rotary_factor "
    "output_attentions attn_implementation experts_implementation quantization_config per_layer_config "
    "tie_last_hidden_states transformers_weights is_causal".split()
)


# PB = penalty-balanced top-k routing, SB = Sinkhorn-balanced, LF = balanced by a bias, loss-free (not the paper's).
# Expert width is left to the configuration's own rule, `intermediate_size / (experts per token + shared experts)`:
# every model of a size has the same active FLOPs.
_PAPER_SIZE = {
    "vocab_size": 128_256,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}

# The same ratios as above (FFN width 2.75 x hidden size) at a size that a CPU trains in minutes.
_TINY_SIZE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

_DENSE = {"num_experts": 0}
_GRANULAR = {"num_experts": 31, "num_experts_per_tok": 3, "num_shared_experts": 1}
_SWITCH = {"num_experts": 8, "num_experts_per_tok": 1, "num_shared_experts": 0}
_PENALTY_BALANCED = {"router_type": "softmax_topk", "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}
_SINKHORN_BALANCED = {"router_type": "sinkhorn", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
_BIAS_BALANCED = {"router_type": "bias_topk", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}

_OF_THE_PAPER: dict[str, dict[str, int | float | str]] = {
    "dense-570m": _PAPER_SIZE | _DENSE,
    "pb-granular-2b": _PAPER_SIZE | _GRANULAR | _PENALTY_BALANCED,
    "sb-granular-2b": _PAPER_SIZE | _GRANULAR | _SINKHORN_BALANCED,
    "lf-granular-2b": _PAPER_SIZE | _GRANULAR | _BIAS_BALANCED,
    "pb-switch-2b": _PAPER_SIZE | _SWITCH | _PENALTY_BALANCED,
    "sb-switch-2b": _PAPER_SIZE | _SWITCH | _SINKHORN_BALANCED,
    "dense-tiny": _TINY_SIZE | _DENSE,
    "pb-granular-tiny": _TINY_SIZE | _GRANULAR | _PENALTY_BALANCED,
    "sb-granular-tiny": _TINY_SIZE | _GRANULAR | _SINKHORN_BALANCED,
    "lf-granular-tiny": _TINY_SIZE | _GRANULAR | _BIAS_BALANCED,
    "pb-switch-tiny": _TINY_SIZE | _SWITCH | _PENALTY_BALANCED,
    "sb-switch-tiny": _TINY_SIZE | _SWITCH | _SINKHORN_BALANCED,
}
# The same sizes with what servers other than transformers run right (docs/serving.md): SiLU, and whole heads rotated.
_SERVED = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
PRESETS = _OF_THE_PAPER | {f"{name}-silu": fields | _SERVED for name, fields in _OF_THE_PAPER.items()}


@strict
class CptMoeConfig(PreTrainedConfig):
    """Sizes, router and penalties of a `cpt_moe` model; the default is the paper's PB granular model.

    `None` means "derive it": each such field says from what. Every contradiction is refused when the configuration is
    built, and a key that nobody knows is warned about by name.
    """

    model_type = "cpt_moe"
    attribute_map = {"num_local_experts": "num_experts"}
    # The cache by either name.
    keys_to_ignore_at_inference = "cache past_key_values router_logits router_indices lm_loss aux_loss z_loss".split()

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": PADDED_SHARD,
        "layers.*.mlp.experts.down_proj": PADDED_SHARD,
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128_256  # Llama-3's tokenizer
    hidden_size: int = 1024
    intermediate_size: int = 2816  # width of a dense feed-forward block
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "gelu"  # gate of every feed-forward block; "gelu" is the exact (erf) form
    max_position_embeddings: int = 2048
    norm_type: str = "rmsnorm"  # or "layernorm" (with bias)
    rms_norm_eps: float = 1e-5  # of either norm
    rope_parameters: RopeParameters | dict | None = None  # None: base 10,000 on the first quarter of each head
    attention_bias: bool = False  # on queries, keys, values and the output projection, as in Llama and Qwen3
    qkv_bias: bool = False  # on queries, keys and values alone, as in Qwen2
    qk_norm: str | None = None  # RMSNorm before rotation: of each "head" (Qwen3) or the whole "projection" (OLMoE)
    sliding_window: int | None = None  # how many tokens a token sees, itself included; None: all before it
    attention_dropout: float | int = 0.0
    initializer_range: float | None = None  # None: small_init for input matrices, wang_init for output projections
    tie_word_embeddings: bool = False
    use_cache: bool = True

    num_experts: int = 31  # E; 0 makes the model dense
    num_experts_per_tok: int | None = None  # K; None: 3, or 0 in a dense model
    moe_intermediate_size: int | None = None  # None: intermediate_size / (K + shared), the dense model's active FLOPs
    num_shared_experts: int | None = None  # experts that see every token; None: 1, or 0 in a dense model
    router_type: str = "softmax_topk"  # or "sinkhorn", or "bias_topk" (sigmoid scores and a bias, DeepSeek-V3's)
    norm_topk_prob: bool | None = None  # divide the K gates by their sum; only for K > 1; None: for bias_topk
    routed_scaling_factor: float | int = 1.0  # on all gates, after they were normalised
    sinkhorn_iterations: int = 3  # passes over rows and columns when the Sinkhorn router trains
    router_aux_loss_coef: float | None = None  # load balance; None: 0.01 for softmax_topk, else 0
    router_z_loss_coef: float | None = None  # squared logsumexp; None: 0.001 for softmax_topk, else 0
    output_router_logits: bool | None = None  # record routers and train on the penalties; None: if any is on
    load_scope: str = "global"  # whose tokens balance loss and Sinkhorn plan count: of all ranks, or "rank"

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        self._warn_of_unknown_keys(kwargs)
        self._derive_unset_fields()
        self.check_architecture()
        # A copy, because transformers completes the dictionary in place.
        self.rope_parameters = None if self.rope_parameters is None else dict(self.rope_parameters)
        kwargs.setdefault("partial_rotary_factor", 0.25)
        self.base_model_tp_plan = self._tp_plan_of_parts() | _TP_PLAN_OF_QK_NORM.get(self.qk_norm, {})
        given_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)
        self.auto_map = AUTO_MAP | given_map
        self._check_rotary_width()

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "CptMoeConfig":
        """Build the configuration of one of `PRESETS`, with any field overridden.

        "pb-granular-2b-tiny" and the like name the tiny twins too.
        Fields that follow from others follow the overrides too: a new `intermediate_size` gives new expert widths.
        Raises ValueError for an unknown preset or an override that is no field.
        """
        preset = re.sub(r"-(570m|2b)-tiny$", "-tiny", preset)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown: choose one of {', '.join(PRESETS)}.")
        unknown = cls._unknown_keys(overrides)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such field of CptMoeConfig to override in preset {preset!r}.")
        return cls(**{**PRESETS[preset], **overrides})

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.num_experts > 0

    @property
    def has_sigmoid_gates(self) -> bool:
        """Whether gates are sigmoids of the logits instead of a softmax."""
        return self.router_type == "bias_topk" or (self.router_type == "sinkhorn" and self.num_experts_per_tok == 1)

    @property
    def has_router_penalty(self) -> bool:
        """Whether training with this configuration adds a router penalty to the loss."""
        coefficients = (self.router_aux_loss_coef, self.router_z_loss_coef)
        return bool(self.output_router_logits) and any(coefficients)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save as transformers does; the Auto map then names the files saved here, wherever the model came from."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_architecture(self) -> None:
        """Raise ValueError, in one line, for the first contradiction between the fields."""
        for name, allowed in (("router_type", ROUTER_TYPES), ("norm_type", NORM_TYPES), ("load_scope", LOAD_SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        self._check_sizes()
        self._check_attention()
        if self.is_moe:
            self._check_experts()
        else:
            self._check_dense()

    @classmethod
    def _unknown_keys(cls, keys: dict) -> list[str]:
        return [key for key in keys if not (key.startswith("_") or key in _KEYS_OF_TRANSFORMERS or hasattr(cls, key))]

    def _warn_of_unknown_keys(self, kwargs: dict) -> None:
        unknown = self._unknown_keys(kwargs)
        if unknown:
            logger.warning(
                f"CptMoeConfig does not know {', '.join(sorted(unknown))}: kept as plain attributes, used by nothing. "
                "Check the spelling."
            )

    def _derive_unset_fields(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self._divided("hidden_size", self.num_attention_heads, "num_attention_heads")
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = 3 if self.is_moe else 0
        if self.num_shared_experts is None:
            self.num_shared_experts = 1 if self.is_moe else 0
        if self.moe_intermediate_size is None and self.is_moe:
            active = self.num_experts_per_tok + self.num_shared_experts
            self.moe_intermediate_size = self._divided(
                "intermediate_size", active, "num_experts_per_tok + num_shared_experts", "moe_intermediate_size"
            )
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.router_type == "bias_topk" and self.num_experts_per_tok > 1
        has_penalties = self.is_moe and self.router_type == "softmax_topk"
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.01 if has_penalties else 0.0
        if self.router_z_loss_coef is None:
            self.router_z_loss_coef = 0.001 if has_penalties else 0.0
        if self.output_router_logits is None:
            self.output_router_logits = self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0

    def _tp_plan_of_parts(self) -> dict[str, str]:
        """The family's plan without entries of feed-forward blocks that this model lacks."""
        absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if self.is_moe else ["mlp.experts"]
        if not self.num_shared_experts:
            absent.append("mlp.shared_experts")
        missing = tuple(f"layers.*.{name}" for name in absent)
        return {name: style for name, style in type(self).base_model_tp_plan.items() if not name.startswith(missing)}

    def _divided(self, name: str, divisor: int, divisor_name: str, derived_name: str = "head_dim") -> int:
        value = getattr(self, name)
        if divisor < 1 or value % divisor:
            raise ValueError(
                f"{name}={value} is not divisible by {divisor} ({divisor_name}): choose a multiple of it, "
                f"or set {derived_name}."
            )
        return value // divisor

    def _check_sizes(self) -> None:
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["num_key_value_heads", "head_dim", "max_position_embeddings", "sinkhorn_iterations"]
        not_negative = ["num_experts", "num_experts_per_tok", "num_shared_experts"]
        not_negative += ["router_aux_loss_coef", "router_z_loss_coef", "attention_dropout"]
        for names, least in ((positive, 1), (not_negative, 0)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}: each key-value head serves the same number of heads."
            )

    def _check_attention(self) -> None:
        if self.qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown: choose one of {', '.join(QK_NORMS)}, or None.")
        if self.attention_bias and self.qkv_bias:
            raise ValueError(
                "attention_bias=True has all biases of qkv_bias=True, and the output projection's: set one of the two."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or None for no window.")

    def _check_experts(self) -> None:
        E, K = self.num_experts, self.num_experts_per_tok
        if not 1 <= K <= E:
            raise ValueError(f"num_experts_per_tok={K} must lie in 1..{E}: num_experts={E} are there to choose from.")
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size={self.moe_intermediate_size} must be at least 1.")
        if not 0 < self.routed_scaling_factor < float("inf"):
            raise ValueError(f"routed_scaling_factor={self.routed_scaling_factor} must be above 0; 1.0 is none.")
        if self.norm_topk_prob and K == 1:
            raise ValueError(
                "norm_topk_prob=True with num_experts_per_tok=1 makes every gate 1, so the router gets no gradient: "
                "set norm_topk_prob=False."
            )
        if self.router_type != "softmax_topk" and self.router_aux_loss_coef > 0:
            way = "plan" if self.router_type == "sinkhorn" else "bias"
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} with router_type={self.router_type!r}, which "
                f"balances by its {way}: set the coefficient to 0 or use router_type='softmax_topk'."
            )

    def _check_dense(self) -> None:
        must_be_off = ["num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "norm_topk_prob"]
        must_be_off += ["router_aux_loss_coef", "router_z_loss_coef", "output_router_logits"]
        set_fields = [f"{name}={getattr(self, name)}" for name in must_be_off if getattr(self, name)]
        if self.router_type != "softmax_topk":
            set_fields.append(f"router_type={self.router_type!r}")
        if self.routed_scaling_factor != 1:
            set_fields.append(f"routed_scaling_factor={self.routed_scaling_factor}")
        if set_fields:
            raise ValueError(
                f"{', '.join(set_fields)}: a dense model (num_experts=0) has no router; leave this unset, "
                "or set num_experts."
            )

    def _check_rotary_width(self) -> None:
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        rotary = int(self.head_dim * factor)
        if not 0 < factor <= 1 or rotary < 2 or rotary % 2:
            raise ValueError(
                f"head_dim={self.head_dim} x partial_rotary_factor={factor} rotates {rotary} dimensions of a head: "
                "it must be an even number, at least 2; change head_dim or partial_rotary_factor (in rope_parameters)."
            )


# Saved checkpoints carry this file, so that they load where the package is not installed.
CptMoeConfig.register_for_auto_class()

__all__ = ["CptMoeConfig"]
