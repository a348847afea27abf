"""KL of a model from its reference straight from hidden states, a few tokens at a time: full logits never exist.

    chunked_kl      (N,) per token, any gradient may come back; the backward pass computes the logits again
    chunked_kl_sum  weighted sum; gradients are made on the way forward, nothing is computed twice
    plain_kl        the definition, on all logits at once

Letters: N tokens, H hidden size, V vocabulary, C tokens of a chunk; z (C, V) logits. At most three tensors of C x V
exist at a time (four with a softcap): one of the model, one of its reference, and one to work in; in half precision a
narrow copy of one of them as well. Nothing of N x V is ever made, and nothing of C x V is kept for the backward pass.
Source: ours; divergence.py has the formulas.

One pass of any causal LM of transformers up to its last hidden states, and what the head makes of them, in chunks.

The model is called as a whole, so that wrappers around it (DistributedDataParallel, PEFT) do their work; a hook on its
decoder takes the hidden states, and the logits of one position are all that the head is asked for there. Neither
cross entropies nor divergences ever form all logits.

Letters: B sequences, S tokens, H hidden size, V vocabulary, N = B (S - 1) tokens that have a next one. Source: ours.

What a model and its tokenizer must be before a surgery begins. Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.extras import require
from hf_moe_cpt.trainers.surgery.losses import check_direction, kl_divergence, token_weights


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


CHUNK_TOKENS = 512
# Fields of configurations by which a model multiplies its logits, as TRL found them; logits_scaling divides.
SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Agreement of logits, relative to the largest one: rounding of the type that the model computes in.
HEAD_TOLERANCE = 0.05


class LanguageHead(NamedTuple):
    """What turns hidden states into logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    form: LogitForm


@dataclass
class ModelPass:
    """Hidden states after the final norm, and what the routers of a mixture of experts are to pay."""

    hidden: Tensor  # (B, S, H)
    router_penalty: Tensor | None = None  # coefficients times auxiliary losses, a scalar


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside wrappers and adapters. Raises ValueError for anything that is none of transformers."""
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
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
    return LanguageHead(_gathered(layer.weight), _gathered(getattr(layer, "bias", None)), _logit_form(inner.config))


def check_head(model: nn.Module) -> None:
    """Raise ValueError unless `head_of` makes this model's logits out of its hidden states, tried on four tokens."""
    inner = causal_lm_of(model)
    tokens = torch.arange(4, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    with torch.no_grad(), _hidden_states(inner) as states:
        logits = inner(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()
        weight, bias, form = head_of(model)
        ours = form.apply(functional.linear(states[-1], weight, bias).float())
    model.train(was_training)
    if not torch.allclose(ours, logits, rtol=0.0, atol=HEAD_TOLERANCE * float(logits.abs().max())):
        raise ValueError(
            f"{type(inner).__name__} makes its logits in a way that is not known here: its head is not the product "
            "with its output embeddings, scaled and capped as its configuration says."
        )


def run_model(model: nn.Module, batch: dict[str, Tensor], *, with_router_penalty: bool = False) -> ModelPass:
    """Run `model` on a batch with input_ids and attention_mask (B, S).

    with_router_penalty: also what the configuration makes the routers of a mixture of experts pay, with its sign as
    it is minimised; None for dense models and without coefficients.
    """
    inner = causal_lm_of(model)
    options: dict[str, Any] = {"use_cache": False}
    accepted = inspect.signature(inner.forward).parameters
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if "output_router_logits" in accepted:
        options["output_router_logits"] = with_router_penalty
    with _hidden_states(inner) as states:
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    return ModelPass(states[-1], _router_penalty(outputs, inner.config) if with_router_penalty else None)


def token_logp(hidden: Tensor, head: LanguageHead, input_ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Log-probability (B, S - 1) in nats of tokens 1 to S - 1, in float32 at least, with gradient.

    hidden: (B, S, H). input_ids: (B, S). The logits of a chunk live only while it is worked on; the backward pass
    computes them again.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    chunks = zip(states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    logps = [
        checkpoint(_target_logp, part, head, labels, use_reentrant=False, preserve_rng_state=False)
        for part, labels in chunks
    ]
    if not logps:
        return hidden.new_zeros(input_ids.shape[0], 0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.cat(logps).view(input_ids.shape[0], -1)


def next_token_kl(
    states: tuple[Tensor, LanguageHead],
    reference: tuple[Tensor, LanguageHead],
    mask: Tensor,
    *,
    normalisation: str = "sequence",
    total: Tensor | int | None = None,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Mean KL in nats per token, a scalar with gradient, and the KL (B, S - 1) of every position, without.

    states, reference: hidden states (B, S, H) and head of model and reference. mask: (B, S - 1) bool, positions whose
    next token counts. normalisation, total: of counted_tokens.py.
    """
    (hidden, head), (ref_hidden, ref_head) = states, reference
    weights = token_weights(mask, normalisation, total)
    loss, kl = chunked_kl_sum(
        hidden[:, :-1].flatten(0, 1),
        head.weight,
        ref_hidden[:, :-1].flatten(0, 1),
        ref_head.weight,
        weights.flatten(),
        direction,
        chunk_tokens,
        bias=head.bias,
        ref_bias=ref_head.bias,
        form=head.form,
    )
    return loss, kl.view(mask.shape)


def _target_logp(states: Tensor, head: LanguageHead, targets: Tensor) -> Tensor:
    logits = functional.linear(states, head.weight, head.bias)
    logits = head.form.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return -functional.cross_entropy(logits, targets, reduction="none")


@contextmanager
def _hidden_states(inner: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that the last hidden states of every call inside this context are appended to."""
    states: list[Tensor] = []
    handle = inner.base_model.register_forward_hook(lambda _, __, outputs: states.append(outputs[0]))
    try:
        yield states
    finally:
        handle.remove()


def _logit_form(config: Any) -> LogitForm:
    config = config.get_text_config()
    scale = next((value for name in SCALE_FIELDS if (value := getattr(config, name, None)) is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1.0 / config.logits_scaling
    return LogitForm(1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))


def _router_penalty(outputs: Any, config: Any) -> Tensor | None:
    config = config.get_text_config()
    terms = [
        getattr(config, f"router_{name}_loss_coef", 0.0) * loss
        for name in ("aux", "z")
        if isinstance(loss := getattr(outputs, f"{name}_loss", None), Tensor)
        and getattr(config, f"router_{name}_loss_coef", 0.0)
    ]
    return sum(terms) if terms else None


def _gathered(parameter: Tensor | None) -> Tensor | None:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# what configuration and weights have in common
SOURCE_OPTIONS = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only")


def config_of(model: str | nn.Module, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a causal LM; of one that is given by name without its weights.

    options: arguments of `from_pretrained`. Raises ValueError for what is no causal LM, and for an adapter alone.
    """
    if isinstance(model, nn.Module):
        return causal_lm_of(model).config
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"{model!r} is an adapter, and a surgery changes whole models: merge it into its base first "
            "(merge_and_unload of PEFT), and name the folder of the result."
        )
    if isinstance(options.get("config"), PreTrainedConfig):
        return options["config"]
    return AutoConfig.from_pretrained(model, **{key: options[key] for key in SOURCE_OPTIONS if key in options})


def open_model(model: str | nn.Module, options: Mapping[str, Any], peft_config: Any = None) -> nn.Module:
    """The model that is operated on, its weights read if it is given by name, with a new adapter if one is wanted.

    Raises ValueError for a head that is not one product.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    if peft_config is not None:
        model = require("peft", needed_by="peft_config").get_peft_model(model, peft_config)
    check_head(model)
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(["hf_moe_cpt", "llm-surgery"])
    return model


def check_sharding(args: Any, *, is_deepspeed: bool, is_fsdp: bool) -> None:
    """Raise ValueError for ways to share a model that a surgery cannot go."""
    if is_deepspeed:
        raise ValueError(
            "DeepSpeed runs one backward pass a step, and a surgery one for each set: use FSDP or plain data "
            "parallelism, or train an adapter."
        )
    if is_fsdp and args.target_experts:
        raise ValueError("target_experts trains rows of whole tensors, which FSDP shards: use data parallelism.")


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
