"""Liger-Kernel for `cpt_moe`: `use_liger_kernel=True` of any Trainer runs the plain layers of our models fused.

| part | what runs it |
|---|---|
| RMSNorm | Liger's, in its "llama" mode: statistics in float32, then the input's type, then the weight |
| rotation of queries and keys | Liger's, in place; it rotates the first part of a head where the model does |
| gated MLP of dense layers and shared experts | Liger's for "silu" and "gelu_pytorch_tanh"; it has no exact GELU |
| head and loss | ours (`fused_head`): Liger's waits for the device twice a step and hides the losses of tokens |
| LayerNorm, routed experts | left alone: torch's norm is one kernel already; see `experts_implementation` |

Only the model that is passed changes, by attributes of its modules. Source: ours, in the form of Liger's own
`apply_liger_kernel_to_*`.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moe_cpt.extras import require
from hf_moe_cpt.kernels.fused_head import fuse_head


MODEL_TYPE = "cpt_moe"
_MLP_OF_ACTIVATION = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}

logger = logging.get_logger(__name__)


def register_with_liger() -> None:
    """Enter `apply_liger_kernel_to_cpt_moe` into Liger's table of model types, which transformers reads."""
    require("liger_kernel", needed_by="register_with_liger")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[MODEL_TYPE] = apply_liger_kernel_to_cpt_moe


def apply_liger_kernel_to_cpt_moe(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
    model: PreTrainedModel | None = None,
) -> None:
    """Let one model of type `cpt_moe` compute with fused kernels; twice is the same as once.

    The arguments are the keys of `liger_kernel_config`. swiglu and geglu count where they are the configured
    activation. Raises ValueError without a model, because no class is changed, and for `cross_entropy`, which in Liger
    replaces torch's function for the whole process.
    """
    require("liger_kernel", needed_by="apply_liger_kernel_to_cpt_moe")
    if model is None:
        raise ValueError("Pass model=...: Liger's kernels are put into one cpt_moe model, never into its classes.")
    if cross_entropy:
        raise ValueError(
            "cross_entropy=True would replace torch's cross entropy for the whole process: leave it False and use "
            "fused_linear_cross_entropy=True."
        )
    decoder = getattr(model, model.base_model_prefix, model)
    if rms_norm and model.config.norm_type == "rmsnorm":
        _fuse_norms(decoder)
    if rope:
        for layer in decoder.layers:
            layer.self_attn.rotate_query_and_key = liger_rotate_query_and_key
    mlp = _MLP_OF_ACTIVATION.get(model.config.hidden_act)
    if (mlp == "swiglu" and swiglu) or (mlp == "geglu" and geglu):
        _fuse_mlps(decoder, mlp)
    if fused_linear_cross_entropy and hasattr(model, "head_and_loss"):
        fuse_head(model)
    logger.info(
        f"Liger kernels in one {type(model).__name__}: rope={rope}, rms_norm={rms_norm} (norm_type "
        f"{model.config.norm_type!r}), gated MLP {mlp or 'plain'} (hidden_act {model.config.hidden_act!r}), "
        f"fused_linear_cross_entropy={fused_linear_cross_entropy}."
    )


def liger_rotate_query_and_key(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first dimensions of each head, as many as cos has: (B, A, S, D) and (B, S, rotated), in place.

    The width is passed on, so that a version of Liger that only rotates whole heads raises instead of misreading.
    """
    from liger_kernel.ops import LigerRopeFunction

    position_ids, unsqueeze_dim = None, 1
    return LigerRopeFunction.apply(query, key, cos, sin, position_ids, unsqueeze_dim, cos.shape[-1])


def _fuse_norms(decoder: nn.Module) -> None:
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module

    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        _patch_rms_norm_module(norm, casting_mode="llama")


def _fuse_mlps(decoder: nn.Module, kind: str) -> None:
    from liger_kernel.transformers.monkey_patch import _patch_geglu_module, _patch_swiglu_module
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    for layer in decoder.layers:
        mlp = layer.mlp.shared_experts if layer.is_moe else layer.mlp
        if mlp is None:
            continue
        if kind == "swiglu":
            _patch_swiglu_module(mlp, LigerSwiGLUMLP)
        else:
            _patch_geglu_module(mlp)
