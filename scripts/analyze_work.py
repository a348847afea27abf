"""From checkpoints to traces: everything is checked before a weight is read, then one model after the other reads.

Layout of the output folder: traces/<name>/ (a routing trace each), then the report. Source: ours.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moe_cpt.analysis.collect_routing import collect_routing, tokenizer_checksum
from hf_moe_cpt.analysis.routing_tap import layers_to_watch
from hf_moe_cpt.analysis.routing_trace import INDEX, RoutingTrace
from hf_moe_cpt.analysis.trace_writer import BEGUN
from hf_moe_cpt.data.sources import load_text_dataset
from hf_moe_cpt.scripts.benchmark_tools import choose_device


if TYPE_CHECKING:
    from hf_moe_cpt.scripts.analyze import CheckpointArguments, TextArguments

_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)
Shape = tuple[int, int | None]  # E and K of a layer, None where the configuration does not tell K
ALL_TEXT = "all"  # what the analysis calls all kinds together


@dataclass(frozen=True)
class Checkpoint:
    """A model or a finished trace, and what it is called in tables."""

    name: str
    path: str
    is_trace: bool


class Tracing:
    """The traces of all checkpoints on the same text; what cannot work raises ValueError before anything is run."""

    def __init__(self, models: CheckpointArguments, text: TextArguments, folder: Path) -> None:
        self.models, self.text, self.folder = models, text, folder
        self.checkpoints = named_checkpoints(models.checkpoints or [])
        to_run = [checkpoint for checkpoint in self.checkpoints if not checkpoint.is_trace]
        kinds = named_texts(text.data or [])
        if to_run and not kinds:
            raise ValueError("--data is needed to run a model: give --data NAME=PATH, or finished traces only.")
        self.state = PartialState(cpu=models.device == "cpu")
        self.device = choose_device(models.device) if self.state.num_processes == 1 else self.state.device
        self.is_main_process = self.state.is_main_process
        self.opened = {each.name: RoutingTrace.open(each.path) for each in self.checkpoints if each.is_trace}
        configs = {checkpoint.name: self._config(checkpoint) for checkpoint in to_run}
        self.tokenizer = self._common_tokenizer(to_run)
        self._check_tokenizer_of_traces()
        self._check_architectures(configs)
        self.data = {name: self._rows(paths) for name, paths in kinds.items()} if to_run else {}

    def traces(self) -> dict[str, RoutingTrace]:
        """By name of the checkpoint, in order."""
        found = {}
        for checkpoint in self.checkpoints:
            found[checkpoint.name] = self.opened.get(checkpoint.name) or self._trace(checkpoint)
        return found

    def check_ranks(self, num_ranks: int | None) -> None:
        """Raise ValueError for more ranks than the smallest layer has experts."""
        if num_ranks is not None and num_ranks > self.fewest_experts:
            raise ValueError(
                f"--num_ranks {num_ranks} must lie in [1, {self.fewest_experts}], the experts of a layer."
            )

    def _trace(self, checkpoint: Checkpoint) -> RoutingTrace:
        if self.is_main_process:
            print(f"{checkpoint.name}: {checkpoint.path}", flush=True)
        model = self._load(checkpoint)
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.text.max_length
        trace = collect_routing(
            model,
            self.data,
            self.folder / "traces" / re.sub(r"[^\w.-]+", "-", checkpoint.name),
            name=checkpoint.path,
            tokenizer=self.tokenizer,
            batch_size=self.text.batch_size,
            max_length=min(self.text.max_length, window),
            tokens_per_domain=self.text.tokens_per_domain,
            probabilities=self.text.router_probabilities,
        )
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return trace

    def _load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        chosen = {name: getattr(self.models, name) for name in ("attn_implementation", "experts_implementation")}
        options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        device_map = self.models.device_map
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=self.models.dtype,
            trust_remote_code=self.models.trust_remote_code,
            **({} if device_map is None else {"device_map": device_map}),
            **options,
        )
        return model if device_map is not None else model.to(self.device)

    # ---- checks ----

    def _common_tokenizer(self, to_run: Sequence[Checkpoint]) -> PreTrainedTokenizerBase | None:
        """The one given, or the first model's if all share it; None if there is nothing to run."""
        given = self.models.tokenizer_name_or_path
        if given is not None:
            return self._tokenizer(given)
        first: PreTrainedTokenizerBase | None = None
        for checkpoint in to_run:
            tokenizer = self._tokenizer(checkpoint.path)
            if first is None:
                first = tokenizer
            elif tokenizer_checksum(tokenizer) != tokenizer_checksum(first):
                raise ValueError(
                    f"{checkpoint.name} has another tokenizer than {to_run[0].name}: only checkpoints that share one "
                    "compare."
                )
        return first

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} has no tokenizer that loads ({_first_line(error)}): give --tokenizer_name_or_path."
            ) from error

    def _config(self, checkpoint: Checkpoint) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.path!r} is neither a finished trace nor a model, here or on the Hub "
                f"({_first_line(error)}): check the spelling."
            ) from error

    def _check_tokenizer_of_traces(self) -> None:
        """Refuse traces of another vocabulary than that of the tokenizer which names the tokens."""
        for name, trace in self.opened.items() if self.tokenizer is not None else ():
            if trace.description.tokenizer not in (None, tokenizer_checksum(self.tokenizer)):
                raise ValueError(
                    f"The trace {name} has another tokenizer than {self.tokenizer.name_or_path}: only checkpoints "
                    "that share one compare."
                )

    def _check_architectures(self, configs: Mapping[str, PretrainedConfig]) -> None:
        """Refuse dense models and different shapes, on models without weights."""
        shapes: dict[str, list[Shape]] = {}
        for name in (checkpoint.name for checkpoint in self.checkpoints):
            if name in self.opened:
                shapes[name] = [(layer.num_experts, layer.experts_per_token) for layer in self.opened[name].layers]
                continue
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    configs[name], trust_remote_code=self.models.trust_remote_code
                )
            top_k = getattr(configs[name].get_text_config(), "num_experts_per_tok", None)
            top_k = top_k if isinstance(top_k, int) else None
            try:
                shapes[name] = [(layer.num_experts, top_k) for layer in layers_to_watch(model)]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self.fewest_experts = min(num_experts for shape in shapes.values() for num_experts, _ in shape)
        first = self.checkpoints[0].name
        for name, shape in shapes.items():
            if not _are_alike(shape, shapes[first]):
                raise ValueError(
                    f"{name} has {_words(shape)}, {first} has {_words(shapes[first])}: only checkpoints of one "
                    "architecture compare."
                )

    def _rows(self, paths: Sequence[str]) -> datasets.Dataset:
        """Documents with the column input_ids or text."""
        source = paths[0] if len(paths) == 1 else list(paths)
        with self.state.main_process_first():
            found = load_text_dataset(source, split=self.text.data_split, text_column=self.text.text_column)
        column = self.text.text_column
        return found.rename_column(column, "text") if column != "text" and column in found.column_names else found


def named_checkpoints(words: Sequence[str]) -> list[Checkpoint]:
    """From PATH or NAME=PATH; a name that is not given is as much of the path's end as tells the checkpoints apart."""
    if not words:
        raise ValueError(
            "No checkpoint was given: hf-moe-cpt analyze CHECKPOINT [CHECKPOINT ...] --data NAME=PATH ..."
        )
    split = [_NAMED.fullmatch(word) if not Path(word).exists() else None for word in words]
    paths = [match[2] if match else word for match, word in zip(split, words, strict=True)]
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        names = [match[1] if match else end for match, end in zip(split, ends, strict=True)]
        if len(set(names)) == len(names):
            break
    else:
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two checkpoints are called {twice!r}: name them, as in start={paths[0]}.")
    return [Checkpoint(name, path, _is_trace(Path(path))) for name, path in zip(names, paths, strict=True)]


def _is_trace(folder: Path) -> bool:
    """Whether it holds a trace, finished or not: an unfinished one is refused as such when it is opened."""
    return any((folder / name).is_file() for name in (INDEX, BEGUN, "shard_00000.safetensors"))


def named_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """From NAME=PATH; paths of one name are read one after the other."""
    found: dict[str, list[str]] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            raise ValueError(f"--data {word!r} has no name: give NAME=PATH, such as english={word.strip('=')}.")
        if match[1] == ALL_TEXT:
            raise ValueError(f"--data {word!r}: the name {ALL_TEXT!r} stands for all kinds together; choose another.")
        found.setdefault(match[1], []).append(match[2])
    return found


def _are_alike(one: Sequence[Shape], other: Sequence[Shape]) -> bool:
    """Whether layers have as many experts, and each token as many of them where both tell."""
    return len(one) == len(other) and all(
        mine[0] == theirs[0] and (mine[1] == theirs[1] or None in (mine[1], theirs[1]))
        for mine, theirs in zip(one, other, strict=True)
    )


def _words(shape: Sequence[Shape]) -> str:
    kinds = [f"{e} experts" + (f", {k} a token" if k else "") for e, k in dict.fromkeys(shape)]
    return f"{len(shape)} MoE layers of {'; '.join(kinds)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
