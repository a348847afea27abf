"""One pass of any causal LM up to its last hidden states, and what its head makes of them, a few tokens at a time.

The model is called as a whole, so that wrappers around it (DistributedDataParallel, PEFT) do their work; a hook on its
decoder takes the hidden states, and the logits of one position are all that the head is asked for there. Neither
log-probabilities nor the KL from a reference ever form all logits:

    token_logp      log-probabilities of the next tokens; the backward pass computes the logits again
    chunked_kl_sum  weighted sum of KLs; gradients are made on the way forward, nothing is computed twice
    plain_kl        its definition, on all logits at once

    forward  KL(P_ref || P) = sum_v P_ref(v) (log P_ref(v) - log P(v))     authors' code: covers what P_ref knows
    reverse  KL(P || P_ref) = sum_v P(v) (log P(v) - log P_ref(v))         printed: avoids what P_ref rules out

Letters: B sequences, S tokens, N = B (S - 1) tokens that have a next one, H hidden size, V vocabulary, C tokens of a
chunk; z (C, V) logits. At most three tensors of C x V exist at a time (four with a softcap): one of the model, one of
its reference, and one to work in; in half precision a narrow copy of one of them as well. Nothing of N x V is ever
made, and nothing of C x V is kept for the backward pass.
Source: ours; Veldanda et al. 2024 (arXiv 2409.13054) for the KL. Their code minimises the cross entropy of the
reference against the model, the forward KL plus the reference's entropy: the same gradient, but not 0 at the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import inner_model, modes_kept, own_penalty_off
from hf_moe_cpt.reading import read_config, read_model, refuse_adapter
from hf_moe_cpt.trainers.common.updates import quantise_experts


CHUNK_TOKENS = 512
# Fields of configurations by which a model multiplies its logits, as TRL found them; logits_scaling divides.
SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Agreement of logits, relative to the largest one: rounding of the type that the model computes in.
HEAD_TOLERANCE = 0.05
# what configuration and weights have in common
SOURCE_OPTIONS = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class LogitForm:
    """How a model turns the product with its head into logits: cap * tanh(scale * (product + bias) / cap)."""

    scale: float = 1.0  # Cohere: logit_scale; Granite: 1 / logits_scaling
    softcap: float | None = None  # Gemma 2: final_logit_softcapping

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


class LanguageHead(NamedTuple):
    """What turns hidden states into logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    form: LogitForm = LogitForm()

    def detached(self) -> LanguageHead:
        """The same numbers without gradient."""
        return LanguageHead(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.form)


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside wrappers and adapters. Raises ValueError for anything that is none of transformers."""
    inner = inner_model(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(
            f"The model is a {type(inner).__name__}, which is no causal LM of transformers: load it with "
            "AutoModelForCausalLM, or wrap such a model with PEFT."
        )
    return inner


def head_of(model: nn.Module) -> LanguageHead:
    """The head of a causal LM, gathered if it is sharded; gradients flow back to the model's own parameters."""
    inner = causal_lm_of(model)
    layer = inner.get_output_embeddings()
    if hasattr(layer, "lora_A"):
        raise ValueError(
            "The head is a LoRA layer, whose logits are more than one product: leave it out of target_modules, or "
            "name it in modules_to_save to train it as a whole."
        )
    weight, bias = (
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for parameter in (layer.weight, getattr(layer, "bias", None))
    )
    config = inner.config.get_text_config()
    scale = next((value for name in SCALE_FIELDS if (value := getattr(config, name, None)) is not None), 1.0)
    if scale == 1.0 and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1.0 / config.logits_scaling
    return LanguageHead(weight, bias, LogitForm(scale, getattr(config, "final_logit_softcapping", None)))


def check_head(model: nn.Module) -> None:
    """Raise ValueError unless `head_of` makes this model's logits out of its hidden states, tried on four tokens."""
    inner = causal_lm_of(model)
    tokens = torch.arange(4, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]
    with modes_kept(model), torch.no_grad(), _hidden_states(inner) as states:
        model.eval()
        logits = inner(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()
        weight, bias, form = head_of(model)
        ours = form.apply(functional.linear(states[-1], weight, bias).float())
    if not torch.allclose(ours, logits, rtol=0.0, atol=HEAD_TOLERANCE * float(logits.abs().max())):
        raise ValueError(
            f"{type(inner).__name__} makes its logits in a way that is not known here: its head is not the product "
            "with its output embeddings, scaled and capped as its configuration says."
        )


def run_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states after the final norm (B, S, H) of a batch with input_ids and attention_mask (B, S)."""
    inner = causal_lm_of(model)
    options: dict[str, Any] = {"use_cache": False, **own_penalty_off(inner)}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = 1
    with _hidden_states(inner) as states:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    return states[-1]


@contextmanager
def layer_output(model: nn.Module, layer: int | None) -> Iterator[list[Tensor]]:
    """A list that the output (B, S, H) of a decoder layer is appended to in every pass; None: of the middle one.

    Raises ValueError for a model whose layers are not found, or for one that it has not.
    """
    inner = causal_lm_of(model)
    count = inner.config.get_text_config().num_hidden_layers
    stacks = (one for one in inner.base_model.modules() if isinstance(one, nn.ModuleList) and len(one) == count)
    stack, place = next(stacks, None), count // 2 if layer is None else layer
    if stack is None or not 0 <= place < count:
        raise ValueError(f"forget_layer={layer}: {type(inner).__name__} has the layers 0 to {count - 1}.")
    outputs: list[Tensor] = []
    keep = lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handle = stack[place].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _hidden_states(inner: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that the last hidden states of every call inside this context are appended to."""
    states: list[Tensor] = []
    handle = inner.base_model.register_forward_hook(lambda _, __, outputs: states.append(outputs[0]))
    try:
        yield states
    finally:
        handle.remove()


def token_logp(hidden: Tensor, head: LanguageHead, input_ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Log-probability (B, S - 1) in nats of tokens 1 to S - 1, in float32 at least, with gradient.

    hidden: (B, S, H). input_ids: (B, S). The logits of a chunk live only while it is worked on; the backward pass
    computes them again.
    """
    return per_token(_target_logp, input_ids[:, 1:], [(hidden[:, :-1], head)], chunk_tokens)


def per_token(
    value: Callable[..., Tensor],
    targets: Tensor,
    models: Sequence[tuple[Tensor, LanguageHead]],
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """value(targets (C,), logits (C, V) of each model) -> (C,), of all tokens (B, S), with gradient.

    targets: (B, S) true tokens. models: hidden states (B, S, H) that predict them, and a head. Logits are in float32
    at least, those of a chunk live only while it is worked on, and the backward pass computes them again.
    """

    def of_chunk(labels: Tensor, *states: Tensor) -> Tensor:
        return value(labels, *(_logits(part, head) for part, (_, head) in zip(states, models, strict=True)))

    columns = [hidden.flatten(0, 1).split(chunk_tokens) for hidden, _ in models]
    parts = [
        checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(targets.flatten().split(chunk_tokens), *columns, strict=True)
    ]
    if not targets.numel():
        hidden = models[0][0]
        return hidden.new_zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.cat(parts).view(targets.shape)


@torch.no_grad()
def token_top1(hidden: Tensor, head: LanguageHead, input_ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Whether each of tokens 1 to S - 1 is the first choice, (B, S - 1) bool; arguments of `token_logp`."""
    states = hidden[:, :-1].flatten(0, 1)
    parts = [functional.linear(part, head.weight, head.bias).argmax(-1) for part in states.split(chunk_tokens)]
    return torch.cat(parts).view(input_ids.shape[0], -1) == input_ids[:, 1:] if parts else input_ids[:, 1:].bool()


def _logits(states: Tensor, head: LanguageHead) -> Tensor:
    logits = functional.linear(states, head.weight, head.bias)
    return head.form.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _target_logp(targets: Tensor, logits: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, targets, reduction="none")


def forward_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P_ref || P) (...,) in nats, at least 0 up to rounding; its gradient with respect to z is P - P_ref.

    logp, ref_logp: (..., V) normalised log-probabilities; the reference is a constant and gets no gradient. A word
    that it rules out (-inf) adds nothing. No floor is set under P: one would stop the pull exactly where the model has
    lost a word that the reference likes.
    """
    return _divergence(ref_logp.detach(), logp)


def reverse_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P || P_ref) (...,) in nats, at least 0 up to rounding; its gradient over z is P (log P - log P_ref - KL)."""
    return _divergence(logp, ref_logp.detach())


KL_DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """sum_v e^left (left - right) over the last axis, where e^left = 0 counts as 0 in value and in gradient."""
    is_ruled_out = left == float("-inf")
    left, right = left.masked_fill(is_ruled_out, 0.0), right.masked_fill(is_ruled_out, 0.0)
    return (left.exp() * (left - right)).masked_fill(is_ruled_out, 0.0).sum(-1)


def plain_kl(
    hidden: Tensor, head: LanguageHead, ref_hidden: Tensor, ref_head: LanguageHead, direction: str = "forward"
) -> Tensor:
    """KL (N,) of each token in nats, with all N x V logits of both models; arguments as in `chunked_kl_sum`."""
    logps = []
    for states, (weight, bias, form) in ((hidden, head), (ref_hidden, ref_head)):
        wide = torch.promote_types(weight.dtype, torch.float32)
        logps.append(form.apply(functional.linear(states, weight, bias).to(wide)).log_softmax(-1))
    return KL_DIRECTIONS[direction](*logps)


def chunked_kl_sum(
    hidden: Tensor,
    head: LanguageHead,
    ref_hidden: Tensor,
    ref_head: LanguageHead,
    weights: Tensor,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """sum(weights * KL) in nats, a scalar with gradient to hidden states and head, none to the reference.

    hidden: (N, H). ref_hidden: (N, H of the reference). weights: (N,) of the tokens, 0 where one does not count; known
    beforehand, they save two products with a head of six, and the gradient over the head, (V, H), lives from the
    forward pass on. Equal models give exactly 0. The products are in autocast's type, or the head's; what follows is
    in float32 at least.
    """
    device = hidden.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    is_cast = is_cast and head.weight.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(device) if is_cast else head.weight.dtype
    plan = _Plan(direction, chunk_tokens, head.form, ref_head.form, dtype, torch.promote_types(dtype, torch.float32))
    return _ChunkedKLSum.apply(plan, weights.detach(), hidden, *head[:2], ref_hidden, *ref_head[:2])


@dataclass(frozen=True)
class _Plan:
    direction: str
    chunk_tokens: int
    form: LogitForm
    ref_form: LogitForm
    dtype: torch.dtype  # of the products
    wide: torch.dtype  # of all that follows


class _ChunkedKLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, weights: Tensor, *tensors: Tensor | None) -> Tensor:
        # Gradients are kept relative to the largest weight: in fp16 a thousandth of a small probability is 0.
        weights = weights.to(plan.wide)
        largest = weights.abs().amax() if weights.numel() else weights.new_ones(())
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        kl, gradients = _walk(tensors, plan, weights / largest, ctx.needs_input_grad[2:5])
        ctx.save_for_backward(largest, *gradients)
        return (kl * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        largest, *gradients = ctx.saved_tensors
        factor = upstream * largest
        scaled = [None if gradient is None else gradient * factor.to(gradient.dtype) for gradient in gradients]
        return None, None, *scaled, None, None, None


def _walk(
    tensors: tuple[Tensor | None, ...], plan: _Plan, upstream: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """KL (N,), and where needed the gradients of sum(upstream * KL) over hidden, head and bias, chunk by chunk."""
    num_tokens = len(tensors[0])
    with _without_autocast(tensors[0].device.type):
        hidden, head, bias, ref_hidden, ref_head, ref_bias = (
            None if tensor is None else tensor.detach().to(plan.dtype) for tensor in tensors
        )
        kl = hidden.new_empty(num_tokens, dtype=plan.wide)
        of_hidden = torch.empty_like(tensors[0]) if needs[0] else None
        of_head = torch.zeros_like(head, dtype=plan.wide) if needs[1] else None
        of_bias = torch.zeros_like(bias, dtype=plan.wide) if needs[2] else None
        for start in range(0, num_tokens, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, num_tokens))
            models = (hidden[chunk], head, bias), (ref_hidden[chunk], ref_head, ref_bias)
            kl[chunk], gradient = _walk_chunk(*models, plan, upstream[chunk] if any(needs) else None)
            if gradient is None:
                continue
            if of_bias is not None:
                of_bias.add_(gradient.sum(0))
            gradient = gradient.to(plan.dtype)
            if of_hidden is not None:
                of_hidden[chunk] = gradient @ head
            if of_head is not None and of_head.dtype == gradient.dtype:
                of_head.addmm_(gradient.T, hidden[chunk])
            elif of_head is not None:  # a wider total is not rounded to the type of its summands
                of_head.add_(gradient.T @ hidden[chunk])
            del gradient  # or it would still be alive when the logits of the next chunk are made
    gradients = zip((of_hidden, of_head, of_bias), tensors[:3], strict=True)
    return kl, [None if total is None else total.to(tensor.dtype) for total, tensor in gradients]


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
    logits = plan.form.apply_(functional.linear(*model).to(plan.wide))
    slope = None if upstream is None else plan.form.softcap_slope(logits)
    logp = logits.log_softmax(-1)
    del logits
    ref_logp = plan.ref_form.apply_(functional.linear(*reference).to(plan.wide)).log_softmax(-1)
    kl, gradient = _kl_and_gradient(logp, ref_logp, plan.direction, upstream is not None)
    if gradient is not None:
        gradient.mul_(plan.form.scale * upstream[:, None])
        if slope is not None:
            gradient.mul_(slope)
    return kl, gradient


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


def config_of(model: str | nn.Module, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a causal LM; of one that is given by name without its weights.

    options: arguments of `from_pretrained`. Raises ValueError for what is no causal LM, and for an adapter alone.
    """
    if isinstance(model, nn.Module):
        return causal_lm_of(model).config
    refuse_adapter(model)
    if isinstance(options.get("config"), PreTrainedConfig):
        return options["config"]
    return read_config(model, **{key: options[key] for key in SOURCE_OPTIONS if key in options})


def open_model(model: str | nn.Module, options: Mapping[str, Any], peft_config: Any = None) -> nn.Module:
    """The model that is operated on, its weights read if it is given by name, with a new adapter if one is wanted.

    Raises ValueError for a head that is not one product.
    """
    if isinstance(model, str):
        model = read_model(AutoModelForCausalLM, model, **options)
    if peft_config is not None:
        model = require("peft", needed_by="peft_config").get_peft_model(model, peft_config)
    quantise_experts(model)
    check_head(model)
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(["hf_moe_cpt", "llm-surgery"])
    return model


def check_vocabulary(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise ValueError unless both models give a probability to the same words."""
    ours, theirs = (causal_lm_of(one).config.get_text_config().vocab_size for one in (model, ref_model))
    if ours != theirs:
        raise ValueError(
            f"The model has a vocabulary of {ours} and ref_model of {theirs}: the reference must be the model before "
            "surgery, with the same tokenizer."
        )
    check_head(ref_model)


def pad_token_of(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any token will do, since padding is masked: that for padding, else that for an end, else 0."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((token for token in ids if token is not None), 0)
