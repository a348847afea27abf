"""Small expert layers with random routing, and the device of kernel tests: the GPU, else Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bf16 as if it were integers, so bf16 is tested on a real device only.
FLOAT_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def patch_language_once() -> None:
    """A function that an interpreted kernel calls finds Triton's language patched: no more time is spent on that.

    The interpreter patches it anew in each of those calls, which is a third of the time of our kernels.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_if_needed(function: Callable) -> object:
        used = [lang for lang in (language, language.core) if any(v is lang for v in function.__globals__.values())]
        if any(language.core.is_builtin(lang.arange) for lang in used):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_needed


@dataclass(frozen=True)
class ExpertLayer:
    """T tokens, K of E experts each, H hidden size, I width; weights scaled so that outputs are of size 1."""

    tokens: Tensor  # (T, H)
    top_k_index: Tensor  # (T, K)
    top_k_weights: Tensor  # (T, K)
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)

    def to(self, dtype: torch.dtype) -> "ExpertLayer":
        """Fresh leaves in another dtype that require gradients."""
        changed = {
            name: getattr(self, name).detach().to(dtype).requires_grad_()
            for name in ("tokens", "top_k_weights", "gate_up", "down")
        }
        return replace(self, **changed)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients flow to."""
        return {name: getattr(self, name) for name in ("tokens", "top_k_weights", "gate_up", "down")}


def expert_layer(
    num_tokens: int, num_experts: int, top_k: int, hidden_size: int, width: int, dtype: torch.dtype = torch.float64
) -> ExpertLayer:
    """A layer whose tokens choose K different experts at random (repeated ones if K > E)."""
    scores = torch.rand(num_tokens, max(num_experts, top_k))
    layer = ExpertLayer(
        tokens=torch.randn(num_tokens, hidden_size),
        top_k_index=scores.argsort(dim=-1)[:, :top_k] % num_experts,
        top_k_weights=torch.rand(num_tokens, top_k),
        gate_up=torch.randn(num_experts, 2 * width, hidden_size) * hidden_size**-0.5,
        down=torch.randn(num_experts, hidden_size, width) * width**-0.5,
    )
    on_device = {name: getattr(layer, name).to(DEVICE) for name in layer.__dataclass_fields__}
    return ExpertLayer(**on_device).to(dtype)
