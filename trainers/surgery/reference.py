"""The model before surgery, which anchors and some forget losses compare with: three ways behind one interface.

    copy      a frozen second model: exact, and all its weights stay in memory
    adapter   the base under a PEFT adapter, which is switched off for the pass: exact, and costs no memory
    cache     the states of every row, on disk, and a copy of the head: exact up to rounding, no pass while training

Whatever the trained model's mode, the reference is in evaluation mode, draws no random numbers and gets no gradient.
Letters: B sequences, S tokens, H hidden size, T = B S; L MoE layers, E experts. Source: ours.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from hf_moe_cpt.trainers.surgery.forget_losses import ForgetLoss
from hf_moe_cpt.trainers.surgery.model_checks import check_vocabulary
from hf_moe_cpt.trainers.surgery.model_pass import (
    CHUNK_TOKENS,
    LanguageHead,
    causal_lm_of,
    head_of,
    run_model,
    token_logp,
)
from hf_moe_cpt.trainers.surgery.pair_losses import PairLoss
from hf_moe_cpt.trainers.surgery.reference_cache import RowStates, fill_states, weights_fingerprint
from hf_moe_cpt.trainers.surgery.routers import RouterTap, Routing, router_probs
from hf_moe_cpt.trainers.surgery.set_mixture import WINNER
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, CHOICES


logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Rows = Mapping[str, Sequence[Sequence[int]]]  # token ids of the rows of each set that is compared
# An adapter that moves states by less, relative to the largest, changes nothing: DoRA's norms are not exact.
ADAPTER_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 0.02


class Reference(ABC):
    """What a surgery asks of the model before it. Every answer is without gradient."""

    chunk_tokens: int

    @property
    @abstractmethod
    def head(self) -> LanguageHead:
        """The head that makes logits of `hidden`."""

    @abstractmethod
    def hidden(self, batch: Batch, name: str) -> Tensor:
        """Hidden states (B, S, H) after the final norm of a batch of the set `name`; at padding they mean nothing."""

    @abstractmethod
    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """What the routers made of a batch, of each MoE layer (T, E); only of a reference built with them."""

    @torch.no_grad()
    def token_logp(self, batch: Batch, name: str) -> Tensor:
        """Log-probability (B, S - 1) in nats of tokens 1 to S - 1."""
        return token_logp(self.hidden(batch, name), self.head, batch["input_ids"], self.chunk_tokens)


class LiveReference(Reference):
    """A model that runs: a frozen copy, or the base of the trained model itself with its adapter switched off."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        is_adapter: bool = False,
        with_routers: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model, self.accelerator, self.is_adapter, self.chunk_tokens = model, accelerator, is_adapter, chunk_tokens
        self._tap = RouterTap(model) if with_routers else None
        self._heard: tuple[Tensor, list[Tensor]] | None = None  # of the last pass, until it is asked for

    @property
    def head(self) -> LanguageHead:
        """The original head, also where the adapter trains one of its own."""
        with self._before():
            weight, bias, form = head_of(self.model)
            return LanguageHead(weight.detach(), None if bias is None else bias.detach(), form)

    @torch.no_grad()
    def hidden(self, batch: Batch, name: str) -> Tensor:
        """One pass of the model; `name` does not matter."""
        listening = nullcontext() if self._tap is None else self._tap.record()
        with self._before(), self.accelerator.autocast(), listening as routing:
            states = run_model(self.model, batch).hidden
        if routing is not None:
            self._heard = batch["input_ids"], router_probs(routing.logits)
        return states

    @torch.no_grad()
    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """Of the pass that `hidden` has just made of this batch, or of one of its own."""
        _require_routers(self._tap is not None)
        if self._heard is None or self._heard[0] is not batch["input_ids"]:
            self.hidden(batch, name)
        (_, probs), self._heard = self._heard, None
        return probs

    def _before(self) -> AbstractContextManager[None]:
        return adapter_off(self.model) if self.is_adapter else nullcontext()


class CachedReference(Reference):
    """States that were computed before step 1; batches say with `row` (B,) which rows of their set they hold."""

    def __init__(
        self,
        states: Mapping[str, RowStates],
        head: LanguageHead,
        num_routers: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.states, self.num_routers, self.chunk_tokens = dict(states), num_routers, chunk_tokens
        self._head = head

    @property
    def head(self) -> LanguageHead:
        """The copy of the head of the model before surgery."""
        return self._head

    def hidden(self, batch: Batch, name: str) -> Tensor:
        """The states of the batch's rows, 0 at padding. Raises ValueError if the batch holds other tokens."""
        return self._of(name).read("hidden", batch)

    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """The distributions of the batch's rows, 0 at padding."""
        _require_routers(self.num_routers > 0)
        layers = [self._of(name).read(_router_key(place), batch) for place in range(self.num_routers)]
        return [layer.flatten(0, 1) for layer in layers]

    def _of(self, name: str) -> RowStates:
        if name not in self.states:
            raise ValueError(f"The reference cache holds {', '.join(self.states)}, not {name}: use reference='copy'.")
        return self.states[name]


def build_reference(
    kind: str,
    model: nn.Module,
    rows: Rows,
    accelerator: Accelerator,
    folder: str | Path,
    *,
    given: nn.Module | None = None,
    with_routers: bool = False,
    batch_size: int = 8,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Reference | None:
    """The reference of a surgery on `model`, which has not begun; None if no set is compared with one.

    kind: "copy", "adapter", "cache", or "auto": adapter where PEFT has an adapter that changes nothing yet, else
    cache. rows: of `compared_rows`. folder: of the cache. given: another model than `model` as the reference.
    with_routers: `router_probs` will be asked for. batch_size: rows of a pass that fills the cache.

    All ranks must call it: each computes a share of the cache and reads all of it. Raises ValueError for a kind that
    does not fit, a reference with another vocabulary, and a disk that cannot hold the cache.
    """
    if kind not in CHOICES["reference"]:
        raise ValueError(f"reference={kind!r} is unknown: choose one of {', '.join(CHOICES['reference'])}.")
    if not rows:
        return None
    if given is not None:
        check_vocabulary(model, given)
    options = {"with_routers": with_routers, "chunk_tokens": chunk_tokens}
    kind = _resolve(kind, model, given)
    if kind == "adapter":
        return LiveReference(model, accelerator, is_adapter=True, **options)
    if kind == "copy":
        frozen = copy.deepcopy(model) if given is None else given
        frozen = _placed(frozen.eval().requires_grad_(False), accelerator.device)
        return LiveReference(frozen, accelerator, **options)
    source = model if given is None else given
    home = causal_lm_of(source).device
    with modes_kept(source):
        _placed(source.eval(), accelerator.device)
        try:
            return _cached(source, rows, accelerator, Path(folder), batch_size, **options)
        finally:
            _placed(source, home)


def compared_rows(sets: Mapping[str, Dataset], losses: Mapping[str, ForgetLoss | PairLoss]) -> dict[str, Any]:
    """Token ids of the rows of every set whose term compares with a reference, winners as `<set>/winner`.

    sets: tokenised sets with a term. losses: forget losses by set.
    """
    needed = [name for name in sets if name in ANCHOR_SETS or (name in losses and losses[name].needs_reference)]
    rows = {name: sets[name]["input_ids"] for name in needed}
    paired = [name for name in needed if "winner_input_ids" in sets[name].column_names]
    return rows | {f"{name}/{WINNER}": sets[name]["winner_input_ids"] for name in paired}


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has its mode, and every parameter its requires_grad, again after this context."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base of a PEFT model in evaluation mode; modules_to_save are the original ones in here.

    PEFT switches the gradient of all its weights on again afterwards, of frozen ones too: that is undone.
    """
    with modes_kept(model):
        model.eval()
        with model.disable_adapter():
            yield


def _resolve(kind: str, model: nn.Module, given: nn.Module | None) -> str:
    has_adapter = hasattr(model, "disable_adapter")
    if kind == "adapter" and not has_adapter:
        raise ValueError(
            f"reference='adapter' needs a PEFT model, not a {type(model).__name__}: pass peft_config, or choose copy "
            "or cache."
        )
    if kind == "adapter" and given is not None:
        raise ValueError("reference='adapter' is the base of the model itself: leave ref_model out, or choose copy.")
    if kind == "auto" and (given is not None or not has_adapter):
        return "cache"
    if kind in ("auto", "adapter") and not _adapter_is_new(model):
        if kind == "auto":
            return "cache"
        logger.warning("The adapter changes the model before step 1: reference='adapter' compares with its base.")
    return "adapter" if kind == "auto" else kind


@torch.no_grad()
def _adapter_is_new(model: nn.Module) -> bool:
    """Whether base and adapter make the same states as the base alone, tried on four tokens."""
    inner = causal_lm_of(model)
    tokens = torch.arange(4, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with modes_kept(model):
        model.eval()
        now = run_model(model, batch).hidden
    with adapter_off(model):
        base = run_model(model, batch).hidden
    limit = ADAPTER_TOLERANCE.get(base.dtype, HALF_TOLERANCE) * float(base.abs().max())
    return torch.allclose(now.float(), base.float(), rtol=0.0, atol=limit)


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    inner = causal_lm_of(model)
    is_spread = getattr(inner, "hf_device_map", None) is not None
    return model if is_spread or inner.device == device else model.to(device)


def _cached(
    model: nn.Module,
    rows: Rows,
    accelerator: Accelerator,
    folder: Path,
    batch_size: int,
    with_routers: bool,
    chunk_tokens: int,
) -> CachedReference:
    """The reference whose states `model`, in evaluation mode on its device, has on disk or makes now."""
    tap = RouterTap(model) if with_routers else None

    @torch.no_grad()
    def states_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        routing: Routing | None
        with accelerator.autocast(), nullcontext() if tap is None else tap.record() as routing:
            found = {"hidden": run_model(model, batch).hidden}
        shape = batch["input_ids"].shape
        for place, probs in enumerate([] if routing is None else router_probs(routing.logits)):
            found[_router_key(place)] = probs.view(*shape, -1)
        return found

    made_by = {"weights": weights_fingerprint(model), "mixed_precision": accelerator.mixed_precision}
    is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    states = fill_states(states_of, rows, accelerator, folder, made_by, batch_size, together=is_sharded)
    weight, bias, form = head_of(model)
    head = LanguageHead(weight.detach().clone(), None if bias is None else bias.detach().clone(), form)
    return CachedReference(states, head, len(tap.layers) if tap is not None else 0, chunk_tokens)


def _router_key(place: int) -> str:
    return f"router_{place}"


def _require_routers(has_them: bool) -> None:
    if not has_them:
        raise ValueError("This reference does not know what routers did: build it with with_routers=True.")
