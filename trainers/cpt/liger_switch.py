"""Whether a run uses Liger-Kernel: what `use_liger_kernel` means for a model, and what is refused. Source: ours."""

from __future__ import annotations

from torch import nn

from hf_moe_cpt.extras import is_installed
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


# Its entry in Liger's table is ours, and its fused head hands the losses of tokens on.
OUR_MODEL_TYPE = "cpt_moe"


def decide_liger(args: CPTConfig, model: nn.Module) -> bool:
    """True or False as asked for; unset: on for a `cpt_moe` on one CUDA device per process, if Liger is installed.

    Several devices in one process (`DataParallel`) copy a model, and Liger's methods stay with the original. Raises
    ValueError where another model's loss would be fused into its head.
    """
    is_ours = model.config.get_text_config().model_type == OUR_MODEL_TYPE
    if args.use_liger_kernel is None:
        return is_ours and args.device.type == "cuda" and args.n_gpu == 1 and is_installed("liger_kernel")
    is_head_fused = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    if args.use_liger_kernel and is_head_fused and not is_ours:
        raise ValueError(
            "use_liger_kernel fuses the loss into the output head, where losses per source cannot be seen: set "
            'liger_kernel_config={"fused_linear_cross_entropy": False}.'
        )
    return args.use_liger_kernel
