"""Output head and cross entropy in one, for one model: the loss of every token, and never the logits of all tokens.

The logits of some tokens are computed, one kernel turns each row of them into its loss and, in place, into its
gradient, and two products carry that gradient on to hidden states and weight; then come the next tokens, in the same
memory. Gradients are thus ready at the end of the forward pass, and the backward pass multiplies them by one number.
`fuse_head(model)` makes one model with the method `head_and_loss` of `CptMoeForCausalLM` train in this way.

With `use_liger_kernel=True` of any Trainer, the plain layers of a `cpt_moe` model run fused as well:

| part | what runs it |
|---|---|
| RMSNorm | Liger's, in its "llama" mode: statistics in float32, then the input's type, then the weight |
| rotation of queries and keys | Liger's, in place; it rotates the first part of a head where the model does |
| gated MLP of dense layers and shared experts | Liger's for "silu" and "gelu_pytorch_tanh"; it has no exact GELU |
| head and loss | ours: Liger's waits for the device twice a step and hides the losses of tokens |
| LayerNorm, routed experts | left alone: torch's norm is one kernel already; see `experts_interface` |

Only the model that is passed changes, by attributes of its modules.

N tokens (B sequences of S), H hidden size, V vocabulary. Source: the scheme is Liger-Kernel's
fused_linear_cross_entropy (arXiv 2410.10989), which waits for the device to count tokens; the code is ours, its entry
in the form of Liger's `apply_liger_kernel_to_*`.
"""

from itertools import chain
from types import MethodType

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from hf_moe_cpt.extras import require
from hf_moe_cpt.kernels.grouped_gemm import IS_INTERPRETED


IGNORED_LABEL = -100
# Memory for the logits of one chunk of tokens. At V = 128,256 in bf16 that is 2,048 tokens: enough rows to keep the
# three products busy, and few enough chunks that adding up the weight gradient costs little.
MAX_LOGITS_BYTES = 512 * 2**20
# A row is read in blocks of this many logits, 32 to a thread, by up to 32 warps, as Liger-Kernel does on Hopper: one
# program fills a multiprocessor, and the rows under way (34 MB at V = 128,256) stay in L2 from one pass to the next.
MAX_BLOCK = 32768
LOGITS_PER_WARP = 1024
_MLP_OF_ACTIVATION = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}

logger = logging.get_logger(__name__)


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: sum of the token losses, with gradient, and the losses (N,) in nats, without.

    hidden: (N, H). weight: (V, H). targets: (N,) int64 in [0, V), or -100 where ignored: that loss is 0. Both results
    are float32, or float64 for float64 inputs.
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum(), losses.detach()


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, row_stride, vocab_size, IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). A program owns one row of logits: it writes the row's loss, then the gradient over the logits.

    The largest logit and the sum of exponentials are found in one pass (online softmax); the second pass reads the row
    again, mostly from L2. Rows are row_stride apart, a multiple of 16, so that no mask splits a vector of logits; what
    lies between the vocabulary and the next row must be -inf and is overwritten. A target outside [0, V) that is not
    IGNORED makes the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    is_counted = target != IGNORED
    is_valid = (target >= 0) & (target < vocab_size)
    target_logit = tl.load(logits_ptr + target, mask=is_valid, other=float("nan")).to(tl.float32)

    # The lowest finite number, not -inf: a block of nothing but -inf must add exp(-inf) = 0 and not exp(nan).
    largest = -3.4028234e38
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + column, mask=column < row_stride, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), 0)
        largest = new_largest
    loss = tl.log(total) - (target_logit - largest)
    tl.store(losses_ptr + row, tl.where(is_counted, loss, 0.0))

    if WITH_GRADIENT:
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + column, mask=column < row_stride, other=float("-inf")).to(tl.float32)
            # softmax - onehot in float32: near a probability of 1 the difference has no digits left in bf16
            gradient = tl.exp(logits - largest) / total - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(is_counted, gradient, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < row_stride)


def tokens_per_chunk(num_tokens: int, vocab_size: int, bytes_per_logit: int, max_logits_bytes: int) -> int:
    """Tokens whose logits fit into `max_logits_bytes`, in chunks of nearly equal size and, if they can be, of 128s."""
    fitting = max(1, max_logits_bytes // (vocab_size * bytes_per_logit))
    unit = 128 if fitting >= 128 else 1
    fitting -= fitting % unit
    even_share = triton.cdiv(num_tokens, triton.cdiv(num_tokens, fitting))
    return min(fitting, triton.cdiv(even_share, unit) * unit)


@torch.library.custom_op("hf_moe_cpt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    max_logits_bytes: int,
    hidden_needs_gradient: bool,
    weight_needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of losses (), losses (N,), and the gradients of the sum over hidden and weight, empty where not needed.

    dtype: what the products are computed in.
    """
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    rows = tokens_per_chunk(num_tokens, vocab_size, dtype.itemsize, max_logits_bytes)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab_size))
    num_warps = min(32, max(1, block // LOGITS_PER_WARP))
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        targets = targets.contiguous()
        losses = hidden.new_empty(num_tokens, dtype=torch.float32)
        hidden_gradient = hidden.new_empty(hidden.shape if hidden_needs_gradient else 0, dtype=dtype)
        weight_gradient = weight.new_empty(weight.shape if weight_needs_gradient else 0)
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        # Rows are aligned whatever V is: the kernel and the products read unaligned ones several times more slowly.
        memory = hidden.new_empty(rows, triton.cdiv(vocab_size, 16) * 16, dtype=dtype)
        for start in range(0, num_tokens, rows):
            chunk = slice(start, min(start + rows, num_tokens))
            logits = memory[: chunk.stop - start, :vocab_size]
            torch.mm(hidden_cast[chunk], weight_cast.T, out=logits)
            memory[:, vocab_size:].fill_(float("-inf"))
            _cross_entropy_kernel[(chunk.stop - start,)](
                logits,
                targets[chunk],
                losses[chunk],
                logits.stride(0),
                vocab_size,
                IGNORED=IGNORED_LABEL,
                WITH_GRADIENT=hidden_needs_gradient or weight_needs_gradient,
                BLOCK=block,
                num_warps=num_warps,
            )  # from here on `logits` is the gradient over them
            if hidden_needs_gradient:
                torch.mm(logits, weight_cast, out=hidden_gradient[chunk])
            if weight_needs_gradient:
                _add_product(weight_gradient, logits.T, hidden_cast[chunk], is_first=start == 0)
        return losses.sum(), losses, hidden_gradient.to(hidden.dtype), weight_gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total (+)= left @ right. A float32 total of half-precision factors never rounds a summand to their type."""
    beta = 0 if is_first else 1  # 0 also means that what `total` holds is not looked at
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(total.device)[0] >= 8:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, dtype, max_logits_bytes, hidden_needs_gradient, weight_needs_gradient):
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    hidden_gradient = hidden.new_empty(hidden.shape if hidden_needs_gradient else 0)
    weight_gradient = weight.new_empty(weight.shape if weight_needs_gradient else 0)
    return losses.new_empty(()), losses, hidden_gradient, weight_gradient


def _keep_gradients(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, losses, hidden_gradient, weight_gradient = output
    ctx.needs = inputs[-2:]
    ctx.save_for_backward(hidden_gradient, weight_gradient)
    ctx.mark_non_differentiable(losses, hidden_gradient, weight_gradient)
    ctx.set_materialize_grads(False)


@once_differentiable
def _multiply_gradients(ctx, upstream: Tensor | None, *unused: Tensor | None) -> tuple:
    gradients = [
        gradient * upstream if is_needed and upstream is not None else None
        for gradient, is_needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return (*gradients, None, None, None, None, None)


_linear_cross_entropy.register_autograd(_multiply_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, max_logits_bytes: int = MAX_LOGITS_BYTES
) -> tuple[Tensor, Tensor]:
    """`plain_linear_cross_entropy` in chunks of at most `max_logits_bytes` of logits, with fused kernels.

    hidden: (N, H). weight: (V, H). targets: (N,) int64, -100 where ignored; another one outside [0, V) makes its loss
    NaN. Under autocast the products are in its type, as for a linear layer; the gradient over a float32 weight is then
    added up in float32. Float64, and devices that Triton does not run on, get the plain definition.

    Gradients are those of the sum, whose entries over the logits lie in [-1, 1], and the backward pass multiplies a
    copy of them by the upstream number. Scaling them beforehand, by 1 / tokens, would not save that pass: gradient
    accumulation, ranks and loss scaling put factors of their own in front, whose value only the device knows; and in
    fp16 the small probabilities would vanish. The pass moves 2 H V numbers beside the 6 N H V operations of the head.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} must be "
            "(N, H), (V, H) and (N,)."
        )
    device_type = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden.dtype
    runs_triton = hidden.is_cuda or IS_INTERPRETED
    is_linear_of_one_type = is_autocast or hidden.dtype == weight.dtype  # another one is refused by the plain one
    if not (runs_triton and is_linear_of_one_type) or hidden.dtype == torch.float64 or hidden.shape[0] == 0:
        return plain_linear_cross_entropy(hidden, weight, targets)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    loss_sum, losses, _, _ = _linear_cross_entropy(hidden, weight, targets, dtype, max_logits_bytes, *needs)
    return loss_sum, losses


def fuse_head(model: PreTrainedModel) -> None:
    """Fuse head and loss of this one model. Twice is the same as once."""
    if not hasattr(model, "head_and_loss"):
        raise ValueError(f"{type(model).__name__} has no method `head_and_loss` that a fused head could replace.")
    model.head_and_loss = MethodType(fused_head_and_loss, model)


def fused_head_and_loss(
    self: PreTrainedModel,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    skip_logits: bool | None = None,
    **kwargs: object,  # what transformers passes to a loss function
) -> tuple[Tensor | None, Tensor | None]:
    """`head_and_loss` of a model: (B, S, H) and labels (B, S) -> None for the logits, and the cross entropy.

    The model's own method serves where logits are wanted (skip_logits; None means: in evaluation) or no labels are
    given, where a hook, an adapter or sharding stands between the head and its weight, and where the loss function is
    neither transformers' for causal LMs nor one that takes token losses (`of_tokens`).
    """
    are_skipped = self.training if skip_logits is None else skip_logits
    of_tokens = (
        _mean_of_tokens if self.loss_function is ForCausalLMLoss else getattr(self.loss_function, "of_tokens", None)
    )
    if labels is None or not are_skipped or of_tokens is None or not _is_bare_linear(self.lm_head):
        return type(self).head_and_loss(self, hidden_states, labels, skip_logits, **kwargs)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
    targets = targets.to(hidden_states.device)
    loss_sum, losses = linear_cross_entropy(hidden_states.flatten(0, -2), self.lm_head.weight, targets.flatten())
    return None, of_tokens(loss_sum, losses.view(targets.shape), targets, kwargs.get("num_items_in_batch"))


def _is_bare_linear(head: nn.Module) -> bool:
    """Whether calling the head is nothing but a product with its weight: no bias, hook, adapter or sharded weight."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    )


def _mean_of_tokens(
    loss_sum: Tensor, losses: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """What `ForCausalLMLoss` makes of token losses: their sum / `num_items_in_batch`, or the mean if that is None."""
    total = targets.ne(IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return loss_sum / (total.to(loss_sum.device) if isinstance(total, Tensor) else total)


def register_with_liger() -> None:
    """Enter `apply_liger_kernel_to_cpt_moe` into Liger's table of model types, which transformers reads."""
    require("liger_kernel", needed_by="register_with_liger")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN["cpt_moe"] = apply_liger_kernel_to_cpt_moe


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
        from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module

        norms_of_layers = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in decoder.layers)
        for norm in (decoder.norm, *chain.from_iterable(norms_of_layers)):
            _patch_rms_norm_module(norm, casting_mode="llama")
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

    return LigerRopeFunction.apply(query, key, cos, sin, None, 1, cos.shape[-1])  # no position_ids, unsqueeze_dim 1


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
