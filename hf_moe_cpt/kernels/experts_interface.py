"""The experts implementations "hf_moe_cpt" and "hf_moe_cpt_low_memory" of transformers, for any of its MoE models.

    AutoModelForCausalLM.from_pretrained(name, experts_implementation="hf_moe_cpt")

What the kernels cannot do (see `why_unsupported`) runs through transformers' grouped_mm, after one log line. The file
stands apart from `experts` because it is imported with transformers' models, also where Triton is not installed.
Importing it registers both names. Source: ours; the contract is that of transformers' `use_experts_implementation`.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.utils import logging

from hf_moe_cpt.extras import is_installed


logger = logging.get_logger(__name__)

HAS_TRITON = is_installed("triton")  # asked once: torch.compile cannot trace the question

# Classes and functions that transformers' models use as `act_fn`, by name: they differ between its versions.
ACTIVATION_OF_NAME = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
}


# Gating rules of transformers' classes that are a clamped gate of ours: where they keep alpha (a name or a number) and
# limit, and what they add to up. tests/kernels compares each with its class.
CLAMPED_GATES: dict[str, tuple[str | float, str, float]] = {
    "GptOssExperts._apply_gate": ("alpha", "limit", 1.0),
    "OpenAIPrivacyFilterExperts._apply_gate": ("alpha", "limit", 1.0),
    "MiniMaxM3VLExperts._apply_gate": ("swiglu_alpha", "swiglu_limit", 1.0),
    "DeepseekV4Experts._apply_gate": (1.0, "limit", 0.0),
    "HYV4Experts._apply_gate": (1.0, "swiglu_limit", 0.0),
    "Glm5NextTextExperts._apply_gate": (1.0, "swiglu_limit", 0.0),
}
DISTRIBUTED = "its weights are distributed tensors"  # whole, or local, where FSDP2 or expert parallelism runs them
FLOAT_GATES = ("BeamExperts._apply_gate",)  # the usual rule, in float32 as ours is


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts of a transformers MoE layer: (T, H), (T, K), (T, K) -> (T, H), dtype of hidden_states."""
    return _experts_forward(self, hidden_states, top_k_index, top_k_weights, low_memory=False)


def experts_forward_low_memory(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`experts_forward` that recomputes the pre-activations in the backward pass instead of keeping them."""
    return _experts_forward(self, hidden_states, top_k_index, top_k_weights, low_memory=True)


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, low_memory: bool
) -> Tensor:
    dtype = _compute_dtype(self, hidden_states)
    reason = why_unsupported(self, hidden_states.device, dtype)
    if reason is not None:
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"The hf_moe_cpt kernels do not run {type(self).__name__}: {reason}; using grouped_mm."
            )
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    from hf_moe_cpt.kernels.experts import experts
    from hf_moe_cpt.kernels.gates import Form

    activation, *constants = _gate(self)
    form = Form(activation, self.is_transposed, not self.is_concatenated, *constants)
    gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
    biases = (None, None)
    if self.has_bias:
        biases = (self.gate_up_proj_bias.to(dtype), self.down_proj_bias.to(dtype))
    num_pairs = getattr(self, "_num_pairs", None)  # set by our expert parallelism
    output = experts(
        hidden_states.to(dtype), top_k_index, top_k_weights, gate_up, down, form, low_memory, num_pairs, *biases
    )
    return output.to(hidden_states.dtype)


def _gate(self: nn.Module) -> tuple:
    """Name of the activation, and alpha, limit and offset of a clamped gate; () if the kernels cannot compute it."""
    rule = type(self)._apply_gate
    activation = ACTIVATION_OF_NAME.get(_activation_name(getattr(self, "act_fn", "silu")))
    if rule.__module__ == "transformers.integrations.moe" or rule.__qualname__ in FLOAT_GATES:
        return () if activation is None else (activation,)
    if rule.__qualname__ not in CLAMPED_GATES or activation != "silu":
        return ()
    alpha, limit, offset = CLAMPED_GATES[rule.__qualname__]
    alpha = getattr(self, alpha) if isinstance(alpha, str) else alpha
    return "clamped", alpha, getattr(self, limit), offset


def why_unsupported(self: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run an experts module with this compute dtype on this device, or None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed (pip install 'hf_moe_cpt[kernels]')"
    from hf_moe_cpt.kernels.grouped_gemm import IS_INTERPRETED

    if device.type != "cuda" and not IS_INTERPRETED:
        return f"the tokens are on {device.type}, the kernels need a GPU"
    allowed = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
    if dtype not in allowed:
        return f"the compute dtype is {dtype}, allowed are {', '.join(str(name) for name in allowed)}"
    if not self.has_gate:
        return "its experts have no gate"
    if getattr(self, "has_post_expert_norm", False):
        return "its experts end in a norm"
    if not _gate(self):
        if type(self)._apply_gate.__module__ != "transformers.integrations.moe":
            return "it has a gating rule of its own"
        return f"its activation is {_activation_name(self.act_fn)}"
    weights = (self.gate_up_proj, self.down_proj)
    if any(hasattr(weight, "to_local") for weight in weights):
        return DISTRIBUTED
    if any(not weight.is_floating_point() or weight.element_size() < 2 for weight in weights):
        return f"its weights are {self.gate_up_proj.dtype}"
    return None


def _compute_dtype(self: nn.Module, hidden_states: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's if it is on, else that of the weights."""
    device_type = hidden_states.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return self.gate_up_proj.dtype


def _activation_name(activation: object) -> str:
    """The class of an activation module, or the name of a function; a tanh-form nn.GELU counts as unknown."""
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        return type(activation).__name__
    return getattr(activation, "__name__", repr(activation))


ExpertsInterface.register("hf_moe_cpt", experts_forward)
ExpertsInterface.register("hf_moe_cpt_low_memory", experts_forward_low_memory)
