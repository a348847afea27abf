"""Packed documents that do not see each other: what a model is handed for it, and the proof that this works.

Models differ in what they make of position_ids that restart. Most of transformers stop attention there; gpt-oss and
granitemoehybrid build their masks without them, flash attention heeds them in a batch of one row only, and recurrent
layers (Mamba, gated delta rule) read on unless a kernel is told the lengths. Hence no signature is trusted: a probe
changes the first document of a packed row and looks at the second.

    positions   position_ids alone
    masks       also the mask of each kind of layer, which transformers builds from them
    lengths     also all rows laid into one, with cu_seq_lens_q/k, max_length_q/k and seq_idx for kernels
    padded      no packing: one document a row

Letters: B rows, T tokens of a row. Source: ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.masking_utils import create_masks_for_generate

from hf_moe_cpt.data.packing import IGNORED_LABEL
from hf_moe_cpt.machine import has_process_group, modes_kept, own_penalty_off
from hf_moe_cpt.trainers.common.distributed import is_sharded, reshard
from hf_moe_cpt.trainers.common.kernels import FLEX_BLOCK, choose_attention


logger = logging.getLogger(__name__)

SHARDING_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # of the launcher, beside those of the arguments
METHODS = ("positions", "masks", "lengths")
PROBED_TOKENS = 16  # of a document: more than convolutions reach, few enough for milliseconds
ROUNDING = 1e-5  # share of the largest logit that float32 may be off by
# What models and kernels raise for arguments or devices that they do not know.
DECLINES = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, ImportError)


@dataclass(frozen=True)
class Isolation:
    """How the rows of a packed batch are handed to `model`, and what the probe saw of each way that it tried."""

    model: PreTrainedModel
    method: str
    seen: Mapping[str, str]

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a forward pass that keeps the documents of a batch apart; rows that are not packed stay."""
        return hand_over(self.model, inputs, self.method)

    def __str__(self) -> str:
        seen = ", ".join(f"{method} {what}" for method, what in self.seen.items())
        how = "one document a row, padded" if self.method == "padded" else f"packed rows, by {self.method}"
        return f"Documents of {type(self.model).__name__} are kept apart: {how} (one changed, the next: {seen})."


def isolation_for(model: nn.Module, args: TrainingArguments, max_length: int) -> Isolation:
    """What keeps packed documents of `model` apart, found by a probe and logged.

    A model that waits on the CPU goes to its device before, unless what will shard it places it, and its attention is
    chosen there. max_length: of a document, in tokens.
    """
    is_dealt = args.fsdp or args.deepspeed or any(map(parse_flag_from_env, SHARDING_FLAGS))
    is_waiting = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    if is_waiting and not is_dealt and args.place_model_on_device is not False:
        model.to(args.device)
    if not is_dealt:
        choose_attention(model, args, max_length)
    methods = METHODS if args.n_gpu <= 1 else METHODS[:2]  # DataParallel deals rows, and could not deal one
    isolation = find_isolation(model, max_length, methods)
    logger.log(logging.WARNING if isolation.method == "padded" else logging.INFO, "%s", isolation)
    return isolation


class AttentionOfShards(TrainerCallback):
    """`choose_attention` for a model that waited to be sharded, once it is on the GPU; documents must stay apart."""

    def __init__(self, isolation: Isolation, max_length: int) -> None:
        self.isolation, self.max_length = isolation, max_length

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **of: Any) -> None:
        """A collective."""
        model, base = of["model"], self.isolation.model
        before = base.config.get_text_config()._attn_implementation
        if not is_sharded(model):
            return
        choose_attention(model, args, self.max_length)
        is_new = base.config.get_text_config()._attn_implementation != before
        if is_new and find_isolation(model, self.max_length, [self.isolation.method]).method == "padded":
            base.set_attn_implementation(before)


def hand_over(model: PreTrainedModel, inputs: dict[str, Any], method: str) -> dict[str, Any]:
    """`inputs` with what keeps the documents apart by `method`; without position_ids nothing is packed."""
    if method not in ("masks", "lengths") or "position_ids" not in inputs:
        return inputs
    apart = inputs | (_laid_into_one(inputs) if method == "lengths" else {})
    positions = apart["position_ids"]
    shape_and_type = torch.empty(*positions.shape, 0, dtype=model.dtype, device=positions.device)
    build = getattr(model, "create_masks_for_generate", create_masks_for_generate)  # some models have their own
    apart["attention_mask"] = build(model.config, shape_and_type, None, None, positions)
    return apart


def _laid_into_one(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """A batch (B, T) as one row (1, B T) with the lengths of its documents; waits for the device, as kernels do."""
    one = {name: inputs[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
    if "labels" in inputs:
        labels = inputs["labels"].clone()
        labels[:, 0] = IGNORED_LABEL  # no row predicts its first token
        one["labels"] = labels.reshape(1, -1)
    begins = one["position_ids"] == 0
    ends = nn.functional.pad(begins[0].nonzero()[:, 0], (0, 1), value=begins.numel()).int()
    longest = int(ends.diff().max())
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return one | lengths | {"seq_idx": (begins.cumsum(-1) - 1).int()}


def find_isolation(model: nn.Module, max_length: int, methods: Sequence[str] = METHODS) -> Isolation:
    """The first of `methods` under which packed documents do not see each other, or "padded" where none is.

    model: where its weights are, sharded or not, or a PEFT model; it is left as it was. max_length: T. Two forward
    passes of two rows for each method that is tried; a collective where ranks share the model. What rank 0 finds
    holds for all. Flash attention of a model that waits on the CPU to be sharded is taken at its word for lengths.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: dict[str, str] = {}
    found = "padded"
    noise = 0.0
    attention = base.config.get_text_config()._attn_implementation or ""
    is_flash = "flash" in attention and next(model.parameters()).device.type == "cpu"
    probed = FLEX_BLOCK // 2 if "flex" in attention else PROBED_TOKENS
    if is_flash and "lengths" in methods:
        seen[attention] = "does not run on the CPU, eager stood in: its kernels are handed the lengths"
        base.config._attn_implementation = "eager"
    with _left_alone(model):
        for method in methods:
            try:
                leak, noise, limit = _probe(model, base, max(1, min(probed, max_length // 2)), method, noise)
                verdict = [leak <= limit, f"moved by {leak:.1e}"]
            except DECLINES as error:
                verdict = [False, f"declined: {' '.join(str(error).split())}"]
            if has_process_group():
                dist.broadcast_object_list(verdict, src=0)
            is_apart, seen[method] = verdict
            if is_apart:
                found = method
                break
    if attention in seen:
        base.config._attn_implementation = attention
        found = found if found == "padded" else "lengths"
    return Isolation(base, found, seen)


def _probe(
    model: nn.Module, base: PreTrainedModel, length: int, method: str, noise: float
) -> tuple[float, float, float]:
    """(leak, noise, limit): largest changes of a logit when the first of two documents in the first row changes.

    leak: of the second document. noise: of the second row, which nothing but rounding reaches; taken over from an
    earlier method where the rows are laid into one. limit: up to where a change is no leak.
    """
    vocab_size = base.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    ids = (7 * torch.arange(4 * length, device=device).view(2, 2 * length) + 1) % vocab_size
    changed = ids.clone()
    changed[0, :length] = (changed[0, :length] + 1) % vocab_size
    packed = {"position_ids": torch.arange(length, device=device).repeat(2, 2), "use_cache": False}
    packed |= own_penalty_off(model)  # as in training; gpt-oss's cannot read masks of its own layers
    before, after = (
        model(**hand_over(base, {"input_ids": rows, **packed}, method)).logits.float().view(2, 2 * length, -1)
        for rows in (ids, changed)
    )
    moved = (after - before).abs().amax(-1)
    if method != "lengths":
        noise = float(moved[1].max())
    rounding = max(ROUNDING, torch.finfo(base.dtype).eps if base.dtype.is_floating_point else 0)
    return float(moved[0, length:].max()), noise, max(10 * noise, rounding * float(before.abs().max()))


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; afterwards modes, random generators and shards are as they were."""
    device = next(model.parameters()).device
    with torch.no_grad(), modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            reshard(model)
