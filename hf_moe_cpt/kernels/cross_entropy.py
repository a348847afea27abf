"""Output head and cross entropy in one, for one model: the loss of every token, and never the logits of all tokens.

The logits of some tokens are computed, one kernel turns each row of them into its loss and, in place, into its
gradient, and two products carry that gradient on to hidden states and weight; then come the next tokens, in the same
memory. Gradients are thus ready at the end of the forward pass, and the backward pass multiplies them by one number.
`fuse_head(model)` makes any one causal LM of transformers with a linear head train in this way.

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

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from hf_moe_cpt.extras import require
from hf_moe_cpt.kernels.grouped_gemm import IS_INTERPRETED
from hf_moe_cpt.machine import modes_kept


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


def plain_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: sum of the token losses, with gradient, and the losses (N,) in nats, without.

    hidden: (N, H). weight: (V, H). targets: (N,) int64 in [0, V), or -100 where ignored: that loss is 0. bias: (V,).
    The logits are scale * (hidden weight^T + bias), and softcap * tanh(. / softcap) of that with a softcap. Both
    results are float32, or float64 for float64 inputs.
    """
    logits = F.linear(hidden, weight, bias)
    logits = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum(), losses.detach()


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, column, vocab_size, scale, softcap, HAS_BIAS: tl.constexpr, IS_CAPPED: tl.constexpr
):  # fmt: skip
    """Logits of a block of columns as the loss sees them, float32, -inf beyond the vocabulary."""
    is_inside = column < vocab_size
    logits = tl.load(logits_ptr + column, mask=is_inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    logits *= scale
    if IS_CAPPED:
        capped = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)  # softcap * tanh(logits / softcap)
        logits = tl.where(is_inside, capped, float("-inf"))
    return logits


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, bias_ptr, targets_ptr, losses_ptr, row_stride, vocab_size, scale, softcap, IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_CAPPED: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). A program owns one row of products: it writes the row's loss, then the gradient over the products.

    The largest logit and the sum of exponentials are found in one pass (online softmax); the second pass reads the row
    again, mostly from L2. Rows are row_stride apart, a multiple of 16, so that no mask splits a vector of logits; what
    lies between the vocabulary and the next row is overwritten by zeros. A target outside [0, V) that is not IGNORED
    makes the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    is_counted = target != IGNORED
    is_valid = (target >= 0) & (target < vocab_size)
    safe = tl.where(is_valid, target, 0)
    target_logit = _load_logits(logits_ptr, bias_ptr, safe, vocab_size, scale, softcap, HAS_BIAS, IS_CAPPED)
    target_logit = tl.where(is_valid, target_logit, float("nan"))

    # The lowest finite number, not -inf: a block of nothing but -inf must add exp(-inf) = 0 and not exp(nan).
    largest = -3.4028234e38
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = _load_logits(logits_ptr, bias_ptr, column, vocab_size, scale, softcap, HAS_BIAS, IS_CAPPED)
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), 0)
        largest = new_largest
    loss = tl.log(total) - (target_logit - largest)
    tl.store(losses_ptr + row, tl.where(is_counted, loss, 0.0))

    if WITH_GRADIENT:
        for start in range(0, vocab_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logits = _load_logits(logits_ptr, bias_ptr, column, vocab_size, scale, softcap, HAS_BIAS, IS_CAPPED)
            # softmax - onehot in float32: near a probability of 1 the difference has no digits left in bf16
            gradient = tl.exp(logits - largest) / total - tl.where(column == target, 1.0, 0.0)
            if IS_CAPPED:
                capped = tl.where(column < vocab_size, logits / softcap, 0.0)
                gradient *= 1.0 - capped * capped
            gradient = tl.where(is_counted, gradient * scale, 0.0)
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
    bias: Tensor | None,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
    max_logits_bytes: int,
    needs_gradient: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of losses (), losses (N,), and the gradients of the sum over hidden, weight, bias, empty where not needed.

    softcap: 0 for none. dtype: what the products are computed in. needs_gradient: of hidden, weight, bias.
    """
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    rows = tokens_per_chunk(num_tokens, vocab_size, dtype.itemsize, max_logits_bytes)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab_size))
    num_warps = min(32, max(1, block // LOGITS_PER_WARP))
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        targets = targets.contiguous()
        losses = hidden.new_empty(num_tokens, dtype=torch.float32)
        hidden_gradient, weight_gradient, bias_gradient = _gradients(hidden, weight, bias, dtype, needs_gradient)
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        # Rows are aligned whatever V is: the kernel and the products read unaligned ones several times more slowly.
        memory = hidden.new_empty(rows, triton.cdiv(vocab_size, 16) * 16, dtype=dtype)
        for start in range(0, num_tokens, rows):
            chunk = slice(start, min(start + rows, num_tokens))
            logits = memory[: chunk.stop - start, :vocab_size]
            torch.mm(hidden_cast[chunk], weight_cast.T, out=logits)
            _cross_entropy_kernel[(chunk.stop - start,)](
                logits,
                bias,
                targets[chunk],
                losses[chunk],
                logits.stride(0),
                vocab_size,
                scale,
                softcap,
                IGNORED=IGNORED_LABEL,
                HAS_BIAS=bias is not None,
                IS_CAPPED=softcap > 0,
                WITH_GRADIENT=any(needs_gradient),
                BLOCK=block,
                num_warps=num_warps,
            )  # from here on `logits` is the gradient over the products
            if needs_gradient[0]:
                torch.mm(logits, weight_cast, out=hidden_gradient[chunk])
            if needs_gradient[1]:
                _add_product(weight_gradient, logits.T, hidden_cast[chunk], is_first=start == 0)
            if needs_gradient[2]:
                bias_gradient += logits.sum(0, dtype=torch.float32)
        bias_gradient = bias_gradient.to(weight.dtype if bias is None else bias.dtype)
        return losses.sum(), losses, hidden_gradient.to(hidden.dtype), weight_gradient, bias_gradient


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients over hidden (N, H), weight (V, H) and, set to 0, bias (V,); empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0, dtype=dtype),
        weight.new_empty(weight.shape if needed[1] else 0),
        weight.new_zeros(weight.shape[0] if needed[2] else 0, dtype=torch.float32),
    )


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
def _(hidden, weight, targets, bias, scale, softcap, dtype, max_logits_bytes, needs_gradient):
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    of_hidden, of_weight, of_bias = _gradients(hidden, weight, bias, hidden.dtype, needs_gradient)
    return losses.new_empty(()), losses, of_hidden, of_weight, of_bias.to(weight.dtype if bias is None else bias.dtype)


def _keep_gradients(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, losses, *gradients = output
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(losses, *gradients)
    ctx.set_materialize_grads(False)


@once_differentiable
def _multiply_gradients(ctx, upstream: Tensor | None, *unused: Tensor | None) -> tuple:
    hidden, weight, bias = (
        gradient * upstream if is_needed and upstream is not None else None
        for gradient, is_needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return hidden, weight, None, bias, None, None, None, None, None


_linear_cross_entropy.register_autograd(_multiply_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`plain_linear_cross_entropy` in chunks of at most `max_logits_bytes` of logits, with fused kernels.

    hidden: (N, H). weight: (V, H). targets: (N,) int64, -100 where ignored; another one outside [0, V) makes its loss
    NaN. bias: (V,). scale: above 0. softcap: above 0, or None. Under autocast the products are in its type, as for a
    linear layer; the gradient over a float32 weight is then added up in float32. Float64, and devices that Triton does
    not run on, get the plain definition.

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
        return plain_linear_cross_entropy(hidden, weight, targets, bias, scale, softcap)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    loss_sum, losses, *_ = _linear_cross_entropy(
        hidden, weight, targets, bias, float(scale), float(softcap or 0.0), dtype, max_logits_bytes, needs
    )
    return loss_sum, losses


class FusedHead:
    """What one model and its output head share while the head computes losses in place of logits.

    The loss is computed inside the head's own call, so that whatever hangs on it (the hooks of FSDP2, of an adapter)
    runs as ever. The head returns a number that stands for the logits; what the model does with them before its loss,
    `scale` and `softcap`, is learnt once, from a pass over two tokens whose logits are known.
    """

    # Seven logits, from which scale and cap are read: small ones show the scale, the last one the cap.
    KNOWN = (-30.0, -1.0, -1e-2, 1e-2, 1.0, 30.0, 1e6)

    def __init__(self, model: PreTrainedModel, in_evaluation: bool) -> None:
        self.model_forward, self.in_evaluation = model.forward, in_evaluation
        self.targets: Tensor | None = None  # (B, S) of the pass under way
        self.found: tuple[Tensor, Tensor] | None = None  # its sum of losses and losses (B, S)
        self.scale: float | None = None  # None: not learnt yet
        self.softcap: float | None = None
        self.is_learning = False

    def head_forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """(B, S, H) -> logits (B, S, V) as ever, or with targets one number (1, 1, 1) that stands for them."""
        if self.is_learning:
            return torch.tensor(self.KNOWN, device=hidden.device).view(1, 1, -1)
        is_dealt = isinstance(head.weight, DTensor)  # over ranks that hold the same tokens
        if self.targets is None or hidden.shape[:-1] != self.targets.shape or is_dealt:
            return type(head).forward(head, hidden)
        rows, targets = hidden.flatten(0, -2), self.targets.to(hidden.device)
        loss_sum, losses = linear_cross_entropy(
            rows, head.weight, targets.flatten(), bias=head.bias, scale=self.scale, softcap=self.softcap
        )
        self.found = loss_sum, losses.view(targets.shape)
        return (0.0 * loss_sum).view(1, 1, 1)

    def learn(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Find scale and softcap; leaves `scale` at 0 if what the model does to its logits is neither."""
        seen: list[Tensor] = []

        def loss_function(logits: Tensor, *_: object, **__: object) -> Tensor:
            seen.append(logits.detach().double().flatten())
            return logits.sum()

        devices = [ids.device] if ids.is_cuda else []
        self.is_learning = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                with modes_kept(model), _loss_function(model, loss_function):
                    model.eval()  # the pass is none of training: nobody counts its tokens or balances its experts
                    self.model_forward(input_ids=ids[:1, :2], labels=ids[:1, :2], use_cache=False)
        finally:
            self.is_learning = False
        self.scale, self.softcap = _scale_and_cap(seen[-1].cpu().tolist(), self.KNOWN) if seen else (0.0, None)
        if not self.scale:
            logger.warning_once(
                f"The head of {type(model).__name__} is not fused with its loss: what it does to logits is not known."
            )


def _scale_and_cap(logits: list[float], known: tuple[float, ...]) -> tuple[float, float | None]:
    """Scale and softcap that turn the `known` logits into these; (0, None) if nothing of that form does."""
    if len(logits) != len(known):
        return 0.0, None
    linear = logits[4] / known[4]
    if all(math.isclose(one, linear * at, rel_tol=1e-5) for one, at in zip(logits, known, strict=True)):
        return max(linear, 0.0), None
    cap = logits[-1]
    if not cap > abs(logits[4]):
        return 0.0, None
    scale = math.atanh(logits[4] / cap) * cap / known[4]
    wanted = [cap * math.tanh(scale * at / cap) for at in known]
    fits = all(math.isclose(one, want, rel_tol=1e-4) for one, want in zip(logits, wanted, strict=True))
    return (scale, cap) if fits else (0.0, None)


@contextmanager
def _loss_function(model: PreTrainedModel, loss_function: Callable) -> Iterator[None]:
    """Let the model compute its loss by `loss_function` inside this context."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss_function
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why head and loss of a model cannot be one, or None if they can."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its output head is {'missing' if head is None else f'a {type(head).__name__}'}, not a linear layer"
    if "forward" in vars(head) and not hasattr(model, "_fused_head"):
        return "the forward of its output head was replaced already"
    is_gathered = isinstance(model, FSDPModule) and isinstance(head.weight, DTensor)  # in the head's own call
    if type(head.weight) not in (Tensor, nn.Parameter) and not is_gathered:
        return f"the weight of its output head is a {type(head.weight).__name__}"
    return None


def fuse_head(model: PreTrainedModel, in_evaluation: bool = False) -> None:
    """Fuse head and loss of this one causal LM: a pass with labels returns a loss and, for the logits, None.

    Twice is the same as once. in_evaluation: also in evaluation mode; else logits are there outside of training. The
    model's own way serves where the loss function is neither transformers' for causal LMs nor one that takes token
    losses (`of_tokens`). Raises ValueError for a head that is not linear.
    """
    reason = why_not_fused(model)
    if reason is not None:
        raise ValueError(f"The head of {type(model).__name__} cannot be fused with its loss: {reason}.")
    if hasattr(model, "_fused_head"):
        model._fused_head.in_evaluation = in_evaluation
        return
    head = model.get_output_embeddings()
    model._fused_head = head._fused_head = FusedHead(model, in_evaluation)
    head.forward = MethodType(_forward_of_head, head)
    signature = wraps(type(model).forward)  # which trainers read
    model.forward = MethodType(signature(lambda *args, **kwargs: _forward_without_logits(*args, **kwargs)), model)


def _forward_of_head(self: nn.Linear, hidden: Tensor) -> Tensor:
    return self._fused_head.head_forward(self, hidden)


def _forward_without_logits(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model whose head is fused: its own, with the loss from the head."""
    fused, labels, ids = self._fused_head, kwargs.get("labels"), kwargs.get("input_ids")
    inner = self.loss_function
    of_tokens = _mean_of_tokens if inner is ForCausalLMLoss else getattr(inner, "of_tokens", None)
    skips = kwargs.pop("skip_logits", None)  # transformers' Trainer asks so where Liger is on
    skips = self.training or fused.in_evaluation if skips is None else skips
    is_wanted = labels is not None and skips and not fused.is_learning
    if not is_wanted or of_tokens is None or ids is None:
        return fused.model_forward(*args, **kwargs)
    if fused.scale is None:
        fused.learn(self, ids)
    if not fused.scale:
        return fused.model_forward(*args, **kwargs)
    targets = kwargs.get("shift_labels")
    fused.targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:] if targets is None else targets

    def loss_function(logits: Tensor, *_: object, num_items_in_batch: Tensor | int | None = None, **others: Any):
        if fused.found is None:
            return inner(logits, *_, num_items_in_batch=num_items_in_batch, **others)
        (loss_sum, losses), fused.found = fused.found, None
        loss_sum = loss_sum + logits.sum()  # which is 0: it carries the gradient through the output of the head
        return of_tokens(loss_sum, losses, fused.targets.to(losses.device), num_items_in_batch)

    try:
        with _loss_function(self, loss_function):
            outputs = fused.model_forward(*args, **kwargs)
    finally:
        fused.targets = fused.found = None
    if getattr(outputs, "logits", None) is not None and outputs.logits.numel() == 1:
        outputs.logits = None
    return outputs


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
    if fused_linear_cross_entropy and why_not_fused(model) is None:
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
