"""Router saturation against the starting model on a fixed probe: a few batches that are run again and again.

The experts that the starting model chose are kept in a file beside the checkpoints, so a resumed run is still compared
with the model that training began with. Letters: L MoE layers, K experts per token, B sequences, S tokens, T tokens
that count. Source: router saturation as in paper 1 (arXiv 2503.05029); the probe is ours.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_cpt.analysis.routing_tap import RoutingTap, inner_model


logger = logging.getLogger(__name__)


class RoutingProbe:
    """Fixed batches, and the experts that the starting model chose for their tokens.

    batches: input_ids (B, S) and, where there is padding, attention_mask (B, S). Raises ValueError for anything else.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = [_checked(batch) for batch in batches]
        if not self.batches:
            raise ValueError("probe holds no batch: give at least one, a dict of input_ids and attention_mask.")
        self.before: list[Tensor] = []  # of each layer (T, K) int16 on the CPU

    def start(self, model: nn.Module, path: Path, step: int, is_writer: bool) -> None:
        """Remember what the model chooses; a resumed run (step > 0) reads what was remembered at its start."""
        if step > 0:
            if self._read(path):
                return
            logger.warning(
                "%s has no routing of the starting model on this probe: saturation is told against step %d.",
                path,
                step,
            )
        self.before = self._choices(model)
        if is_writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            layers = {f"layer_{layer:03d}": index for layer, index in enumerate(self.before)}
            save_file(layers, path, metadata={"tokens": self._checksum()})

    def saturation(self, model: nn.Module) -> list[float]:
        """Share of a token's experts that the starting model chose too: of each layer a number in [0, 1]."""
        now = self._choices(model)
        kept = [
            (after[:, :, None] == before[:, None, :]).any(-1).double().mean()
            for after, before in zip(now, self.before, strict=True)
        ]
        return torch.stack(kept).tolist()

    def _choices(self, model: nn.Module) -> list[Tensor]:
        """The experts of every token that counts, of each layer (T, K) int16 on the CPU."""
        tap = RoutingTap(model, with_probabilities=False)
        inner = inner_model(model)
        is_known = isinstance(inner, PreTrainedModel)
        decoder, options = (
            (inner.base_model, {"use_cache": False}) if is_known else (inner, {})
        )  # heads are not needed
        device = next(model.parameters()).device
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            parts = []
            with torch.no_grad(), tap.listening():
                for ids, mask in self.batches:
                    decoder(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
                    kept = mask.flatten().bool()
                    parts.append([layer.experts.cpu()[kept] for layer in tap.take(ids.numel())])
            return [torch.cat(layer) for layer in zip(*parts, strict=True)]
        finally:
            for module, was_training in modes:
                module.training = was_training

    def _read(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("tokens") != self._checksum():
                    return False
                self.before = [file.get_tensor(name) for name in sorted(file.keys())]
        except (OSError, SafetensorError):
            return False
        return True

    def _checksum(self) -> str:
        found = hashlib.sha256()
        for ids, mask in self.batches:
            found.update(ids.numpy().tobytes() + mask.numpy().tobytes())
        return found.hexdigest()


def _checked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, S) int64 on the CPU."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        has = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"A batch of the probe has {has}: it needs input_ids (B, S), and attention_mask for padding.")
    ids = torch.as_tensor(batch["input_ids"]).long().cpu()
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).long().cpu()
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"A batch of the probe has input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}: both must "
            "be (B, S)."
        )
    return ids, mask
