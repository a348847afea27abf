"""From checkpoints to traces: everything is checked before a weight is read, then one model after the other reads.

Layout of the output folder: traces/<name>/ (a routing trace each), then the report. Source: ours.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.analysis.collect_routing import collect_routing, tokenizer_checksum
from hf_moe_cpt.analysis.routing_tap import layers_to_watch
from hf_moe_cpt.analysis.routing_trace import INDEX, RoutingTrace
from hf_moe_cpt.data.sources import load_text_dataset
from hf_moe_cpt.scripts.benchmark_tools import choose_device


if TYPE_CHECKING:
    from hf_moe_cpt.scripts.analyze import CheckpointArguments, TextArguments

_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)
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
        self.checkpoints = named_checkpoints(models.checkpoints)
        to_run = [checkpoint for checkpoint in self.checkpoints if not checkpoint.is_trace]
        kinds = named_texts(text.data or [])
        if to_run and not kinds:
            raise ValueError("--data is needed to run a model: give --data NAME=PATH, or finished traces only.")
        self.state = PartialState(cpu=models.device == "cpu")
        self.device = choose_device(models.device) if self.state.num_processes == 1 else self.state.device
        self.is_main_process = self.state.is_main_process
        self.tokenizer = self._common_tokenizer(to_run)
        self._check_architectures(to_run)
        self.data = {name: self._rows(paths) for name, paths in kinds.items()} if to_run else {}

    def traces(self) -> dict[str, RoutingTrace]:
        """By name of the checkpoint, in order."""
        found = {}
        for checkpoint in self.checkpoints:
            if checkpoint.is_trace:
                found[checkpoint.name] = RoutingTrace.open(checkpoint.path)
            else:
                found[checkpoint.name] = self._trace(checkpoint)
        return found

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

    def _check_architectures(self, to_run: Sequence[Checkpoint]) -> None:
        """Refuse dense models and different shapes, on models without weights."""
        shapes: dict[str, list[int]] = {}
        for checkpoint in to_run:
            trust = self.models.trust_remote_code
            config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
            try:
                shapes[checkpoint.name] = [layer.num_experts for layer in layers_to_watch(model)]
            except ValueError as error:
                raise ValueError(f"{checkpoint.name}: {error}") from error
        for name, shape in shapes.items():
            first = next(iter(shapes))
            if shape != shapes[first]:
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
    return [Checkpoint(name, path, (Path(path) / INDEX).is_file()) for name, path in zip(names, paths, strict=True)]


def named_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """From NAME=PATH; paths of one name are read one after the other."""
    found: dict[str, list[str]] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            raise ValueError(f"--data {word!r} has no name: give NAME=PATH, such as english={word}.")
        if match[1] == ALL_TEXT:
            raise ValueError(f"--data {word!r}: the name {ALL_TEXT!r} stands for all kinds together; choose another.")
        found.setdefault(match[1], []).append(match[2])
    return found


def _words(shape: Sequence[int]) -> str:
    return f"{len(shape)} MoE layers of {', '.join(map(str, dict.fromkeys(shape)))} experts"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
