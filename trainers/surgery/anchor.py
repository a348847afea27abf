"""KL of a model from its reference straight from hidden states, a few tokens at a time: full logits never exist.

    chunked_kl      (N,) per token, any gradient may come back; the backward pass computes the logits again
    chunked_kl_sum  weighted sum; gradients are made on the way forward, nothing is computed twice
    plain_kl        the definition, on all logits at once

Letters: N tokens, H hidden size, V vocabulary, C tokens of a chunk; z (C, V) logits. At most three tensors of C x V
exist at a time (four with a softcap): one of the model, one of its reference, and one to work in; in half precision a
narrow copy of one of them as well. Nothing of N x V is ever made, and nothing of C x V is kept for the backward pass.
Source: ours; divergence.py has the formulas.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hf_moe_cpt.trainers.surgery.divergence import check_direction, kl_divergence


@dataclass(frozen=True)
class LogitForm:
    """How a model turns the product with its head into logits: cap * tanh(scale * (product + bias) / cap)."""

    scale: float = 1.0  # Cohere: logit_scale; Granite: 1 / logits_scaling
    softcap: float | None = None  # Gemma 2: final_logit_softcapping

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap={self.softcap} must be above 0, or None for none.")

    def apply(self, logits: Tensor) -> Tensor:
        """The logits of the products `logits`, with gradient."""
        logits = logits if self.scale == 1.0 else self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in the memory of `logits`, where no gradient is recorded."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the softcap from its results `logits`; None without one."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)


def plain_kl(
    hidden: Tensor,
    head: Tensor,
    ref_hidden: Tensor,
    ref_head: Tensor,
    direction: str = "forward",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    form: LogitForm | None = None,
) -> Tensor:
    """The definition of `chunked_kl`, with all N x V logits of both models."""
    form = form or LogitForm()
    wide = torch.promote_types(head.dtype, torch.float32)
    logps = []
    for states, weight, offset in ((hidden, head, bias), (ref_hidden, ref_head, ref_bias)):
        logits = form.apply(functional.linear(states, weight, offset).to(wide))
        logps.append(logits.log_softmax(-1))
    return kl_divergence(*logps, direction)


def chunked_kl(
    hidden: Tensor,
    head: Tensor,
    ref_hidden: Tensor,
    ref_head: Tensor,
    direction: str = "forward",
    chunk_tokens: int = 512,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    form: LogitForm | None = None,
) -> Tensor:
    """KL (N,) in nats per token, float32 or float64, with gradient to hidden, head and bias; none to the reference.

    hidden: (N, H). head: (V, H). bias: (V,), if the head has one. ref_...: the same of the reference, whose hidden
    size may differ. Equal models give exactly 0. The products are in autocast's type, or the head's; what follows is
    in float32 at least. A head that is sharded over devices must be gathered first.
    """
    tensors = _Tensors(hidden, head, bias, ref_hidden, ref_head, ref_bias)
    plan = _checked_plan(tensors, direction, chunk_tokens, form)
    return _ChunkedKL.apply(plan, *tensors)


def chunked_kl_sum(
    hidden: Tensor,
    head: Tensor,
    ref_hidden: Tensor,
    ref_head: Tensor,
    token_weights: Tensor,
    direction: str = "forward",
    chunk_tokens: int = 512,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    form: LogitForm | None = None,
) -> tuple[Tensor, Tensor]:
    """sum(token_weights * KL), a scalar with gradient, and the KL (N,) of each token, without.

    The same numbers as from `chunked_kl` for four products with a head instead of six, since the weight of each token
    is known beforehand: token_weights (N,), as from counted_tokens.py, 0 where a token does not count. The gradient
    over the head, (V, H), lives from the forward pass on.
    """
    tensors = _Tensors(hidden, head, bias, ref_hidden, ref_head, ref_bias)
    plan = _checked_plan(tensors, direction, chunk_tokens, form)
    if token_weights.shape != hidden.shape[:1]:
        raise ValueError(f"token_weights {tuple(token_weights.shape)} must be one per token, ({hidden.shape[0]},).")
    return _ChunkedKLSum.apply(plan, token_weights.detach(), *tensors)


class _Tensors(NamedTuple):
    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_head: Tensor
    ref_bias: Tensor | None


class _Gradients(NamedTuple):
    """Over hidden, head and bias; None where not needed."""

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class _Plan:
    direction: str
    chunk_tokens: int
    form: LogitForm
    dtype: torch.dtype  # of the products
    wide: torch.dtype  # of all that follows


def _checked_plan(tensors: _Tensors, direction: str, chunk_tokens: int, form: LogitForm | None) -> _Plan:
    check_direction(direction)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1: 512 is usual.")
    hidden, head, bias, ref_hidden, ref_head, ref_bias = tensors
    for states, weight, name in ((hidden, head, "hidden and head"), (ref_hidden, ref_head, "ref_hidden and ref_head")):
        if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name} {tuple(states.shape)} and {tuple(weight.shape)} must be (tokens, hidden size) and "
                "(vocabulary, hidden size): flatten batch and time first."
            )
    if hidden.shape[0] != ref_hidden.shape[0]:
        raise ValueError(
            f"hidden has {hidden.shape[0]} tokens and ref_hidden {ref_hidden.shape[0]}: they must be the same tokens."
        )
    if head.shape[0] != ref_head.shape[0]:
        raise ValueError(
            f"head has {head.shape[0]} words and ref_head {ref_head.shape[0]}: model and reference need one "
            "vocabulary; resize neither, or both."
        )
    for offset, name in ((bias, "bias"), (ref_bias, "ref_bias")):
        if offset is not None and offset.shape != head.shape[:1]:
            raise ValueError(f"{name} {tuple(offset.shape)} must be one number per word, ({head.shape[0]},).")
    device = hidden.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    is_cast = is_cast and head.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if is_cast else head.dtype
    return _Plan(direction, chunk_tokens, form or LogitForm(), dtype, torch.promote_types(dtype, torch.float32))


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor | None) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        kl, _ = _walk(_Tensors(*tensors), plan, None, (False, False, False))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        _, gradients = _walk(_Tensors(*ctx.saved_tensors), ctx.plan, upstream, ctx.needs_input_grad[1:4])
        return None, *gradients, None, None, None


class _ChunkedKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, weights: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        # Gradients are kept relative to the largest weight: in fp16 a thousandth of a small probability is 0.
        weights = weights.to(plan.wide)
        largest = weights.abs().amax() if weights.numel() else weights.new_ones(())
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        kl, gradients = _walk(_Tensors(*tensors), plan, weights / largest, ctx.needs_input_grad[2:5])
        ctx.save_for_backward(largest, *gradients)
        ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        return (kl * weights).sum(), kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor | None, _: Tensor | None) -> tuple:
        largest, *gradients = ctx.saved_tensors
        if upstream is None:
            return (None,) * 8
        factor = upstream * largest
        scaled = [None if gradient is None else gradient * factor.to(gradient.dtype) for gradient in gradients]
        return None, None, *scaled, None, None, None


def _walk(
    tensors: _Tensors, plan: _Plan, upstream: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, _Gradients]:
    """KL (N,) and, where needed, the gradients of sum(upstream * KL), chunk by chunk."""
    num_tokens = tensors.hidden.shape[0]
    upstream = upstream if any(needs) else None
    with _without_autocast(tensors.hidden.device.type):
        hidden, head, bias, ref_hidden, ref_head, ref_bias = (
            None if tensor is None else tensor.detach().to(plan.dtype) for tensor in tensors
        )
        kl = tensors.hidden.new_empty(num_tokens, dtype=plan.wide)
        totals = _Gradients(
            torch.empty_like(tensors.hidden) if needs[0] else None,
            torch.zeros_like(head, dtype=plan.wide) if needs[1] else None,
            torch.zeros_like(bias, dtype=plan.wide) if needs[2] else None,
        )
        for start in range(0, num_tokens, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, num_tokens))
            models = (hidden[chunk], head, bias), (ref_hidden[chunk], ref_head, ref_bias)
            kl[chunk], gradient = _walk_chunk(*models, plan, None if upstream is None else upstream[chunk])
            if gradient is None:
                continue
            if needs[2]:
                totals.bias.add_(gradient.sum(0))
            gradient = gradient.to(plan.dtype)
            if needs[0]:
                totals.hidden[chunk] = gradient @ head
            if needs[1]:
                _add_product(totals.head, gradient.T, hidden[chunk])
            del gradient  # or it would still be alive when the logits of the next chunk are made
    return kl, _Gradients(
        *(None if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, tensors[:3], strict=True))
    )


def _without_autocast(device_type: str) -> AbstractContextManager:
    is_available = torch.amp.is_autocast_available(device_type)  # not on the meta device
    return torch.autocast(device_type, enabled=False) if is_available else nullcontext()


def _walk_chunk(
    model: tuple[Tensor, Tensor, Tensor | None],
    reference: tuple[Tensor, Tensor, Tensor | None],
    plan: _Plan,
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """KL (C,) and, given the upstream gradient (C,), the gradient (C, V) over the products with head and bias."""
    logits = _logits(*model, plan)
    slope = None if upstream is None else plan.form.softcap_slope(logits)
    logp = logits.log_softmax(-1)
    del logits
    ref_logp = _logits(*reference, plan).log_softmax(-1)
    kl, gradient = _kl_and_gradient(logp, ref_logp, plan.direction, upstream is not None)
    if gradient is not None:
        gradient.mul_(plan.form.scale * upstream[:, None])
        if slope is not None:
            gradient.mul_(slope)
    return kl, gradient


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
    return plan.form.apply_(functional.linear(hidden, head, bias).to(plan.wide))


def _kl_and_gradient(
    logp: Tensor, ref_logp: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL (C,) and its gradient over z (C, V). Both inputs are overwritten."""
    if direction == "forward":
        ref_p = ref_logp.exp()
        kl = ref_logp.sub_(logp).mul_(ref_p).sum(-1)
        return kl, logp.exp_().sub_(ref_p) if with_gradient else None
    p = logp.exp()
    gap = logp.sub_(ref_logp)
    kl = torch.mul(p, gap, out=ref_logp).sum(-1)
    return kl, gap.sub_(kl[:, None]).mul_(p) if with_gradient else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a wider total is not rounded to the type of its summands."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
