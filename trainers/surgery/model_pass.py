"""One pass of any causal LM of transformers up to its last hidden states, and what the head makes of them, in chunks.

The model is called as a whole, so that wrappers around it (DistributedDataParallel, PEFT) do their work; a hook on its
decoder takes the hidden states, and the logits of one position are all that the head is asked for there. Neither
cross entropies nor divergences ever form all logits.

Letters: B sequences, S tokens, H hidden size, V vocabulary, N = B (S - 1) tokens that have a next one. Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_moe_cpt.trainers.surgery.anchor import LogitForm, chunked_kl_sum
from hf_moe_cpt.trainers.surgery.counted_tokens import token_weights


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
