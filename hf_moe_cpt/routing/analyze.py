"""The command analyze: how checkpoints of any mixture of experts route the same text, from their paths to a report.

Everything is checked before a weight is read, then one model after the other reads the text. Layout of the output
folder: traces/<name>/ (a routing trace each), then the report. Curves of training come from the logs of our trainers
and of RouterMonitorCallback. Source: ours; what recovery means is said in `hf_moe_cpt.routing.metrics`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from hf_moe_cpt.data.text import first_line_of, load_text_dataset
from hf_moe_cpt.machine import DEVICES, DTYPES, check_names, choose_device, release_memory
from hf_moe_cpt.reading import read_config, read_json, read_model, read_tokenizer, reading
from hf_moe_cpt.routing.compare import ALL, Shape, analyse_traces, check_alike, shape_of
from hf_moe_cpt.routing.hooks import layers_to_watch
from hf_moe_cpt.routing.metrics import AVERAGES, imbalance_curve
from hf_moe_cpt.routing.report import tables, write_routing_report
from hf_moe_cpt.routing.trace import BEGUN, INDEX, RoutingTrace, collect_routing, tokenizer_checksum


_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)


class Gather(argparse.Action):
    """An option with several values that may be given several times: all of them count, over those of a file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


@dataclass
class CheckpointArguments:
    """What is compared. Words before the first option are checkpoints too."""

    checkpoints: list[str] | None = HfArg(
        default=None,
        metadata={"action": Gather},
        help="Hub ids, folders of models or of finished traces, each as PATH or NAME=PATH; the start first.",
    )
    tokenizer_name_or_path: str | None = HfArg(default=None, help="Tokenizer, if not the first model's.")
    dtype: str = HfArg(default="auto", help=f"Type of the weights: {', '.join(DTYPES)}.")
    device: str = HfArg(default="auto", help="auto, cpu or cuda.")
    device_map: str | None = HfArg(
        default=None, help="Spread each model over devices, such as auto; one process only."
    )
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    experts_implementation: str | None = HfArg(default=None, help="eager, grouped_mm, ...")
    trust_remote_code: bool = HfArg(default=False, help="Run model code from the Hub repository.")

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--device", [self.device], DEVICES)


@dataclass
class TextArguments:
    """What the models read; needed unless all checkpoints are traces."""

    data: list[str] | None = HfArg(
        default=None,
        metadata={"action": Gather},
        help="Kinds of text as NAME=PATH: a .jsonl .json .parquet .arrow .txt .md file, a folder, a Hub id.",
    )
    text_column: str = HfArg(default="text", help="Column of the text; input_ids is read as tokens.")
    data_split: str = HfArg(default="train", help="Split of folders and of data sets on the Hub.")
    tokens_per_domain: int = HfArg(default=200_000, help="Read the first so many tokens of each kind.")
    max_length: int = HfArg(default=1024, help="Longer texts are cut into sequences of so many tokens.")
    batch_size: int = HfArg(default=8, help="Sequences side by side.")
    router_probabilities: bool = HfArg(
        default=True, help="Record the router's distribution too, for its entropy and confidence."
    )

    def __post_init__(self) -> None:
        _check_positive(self, "tokens_per_domain", "max_length", "batch_size")


@dataclass
class ReportArguments:
    """What is made of it, and where it goes."""

    output_dir: str = HfArg(
        default="routing-analysis", help="Traces, report.html and tables; killed work goes on in it."
    )
    title: str = HfArg(default="How robust is the router?", help="Heading of the page.")
    log_history: list[str] | None = HfArg(
        default=None,
        metadata={"action": Gather},
        help="Runs of ours whose logged MRI is shown by step, as NAME=RUN, or NAME=BEFORE,AFTER for a run that "
        "went on from another: the data changes between the two.",
    )
    shift_step: int | None = HfArg(
        default=None,
        metadata={"range": "[0, inf)"},
        help="First step on new data in the runs that are a single one.",
    )
    vocabulary_average: str = HfArg(
        default="occurrences", help=f"Of vocabulary specialisation: {', '.join(AVERAGES)}."
    )
    top_tokens: int = HfArg(default=8, help="Tokens to list for each expert.")
    min_occurrences: int = HfArg(default=10, help="Rarer tokens are not listed.")
    num_ranks: int | None = HfArg(
        default=None, help="Ranks of the estimate under expert parallelism; 8 if there are as many experts."
    )

    def __post_init__(self) -> None:
        check_names("--vocabulary_average", [self.vocabulary_average], AVERAGES)
        _check_positive(self, "top_tokens", "min_occurrences", "num_ranks")
        if self.shift_step is not None and not self.log_history:
            raise ValueError(f"--shift_step {self.shift_step} marks a step of --log_history, which is not given.")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")


def analyze(models: CheckpointArguments, text: TextArguments, report: ReportArguments) -> None:
    """Check everything, trace what is not traced yet, analyse, write, print. ValueError for what cannot work."""
    training = training_curves(report.log_history or [], report.shift_step)
    work = Tracing(models, text, Path(report.output_dir))
    work.check_ranks(report.num_ranks)
    traces = work.traces()
    if not work.is_main_process:
        return
    analysis = analyse_traces(
        traces,
        tokenizer=work.tokenizer,
        training=training,
        average=report.vocabulary_average,
        num_top_tokens=report.top_tokens,
        min_occurrences=report.min_occurrences,
        num_ranks=report.num_ranks,
        progress=True,
    )
    page = write_routing_report(analysis, report.output_dir, report.title)
    print(tables(analysis))
    print(f"\nreport: {page}\nnumbers: analysis.json, layers.csv and others beside it")


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
        release_memory(self.device)
        return trace

    def _load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        optional = ("attn_implementation", "experts_implementation", "device_map")
        model = read_model(
            AutoModelForCausalLM,
            checkpoint.path,
            dtype=self.models.dtype,
            trust_remote_code=self.models.trust_remote_code,
            **{name: value for name in optional if (value := getattr(self.models, name)) is not None},
        )
        return model if self.models.device_map is not None else model.to(self.device)

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
            return read_tokenizer(name, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} has no tokenizer that loads ({first_line_of(error)}): give --tokenizer_name_or_path."
            ) from error

    def _config(self, checkpoint: Checkpoint) -> PretrainedConfig:
        try:
            return read_config(checkpoint.path, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.path!r} is neither a finished trace nor a model, here or on the Hub "
                f"({first_line_of(error)}): check the spelling."
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
        checkpoints = {checkpoint.name: checkpoint.path for checkpoint in self.checkpoints}
        for name in checkpoints:
            if name in self.opened:
                shapes[name] = shape_of(self.opened[name])
                continue
            with torch.device("meta"), reading(f"the configuration of {checkpoints[name]!r}"):
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
        check_alike(shapes)

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
        if match[1] == ALL:
            raise ValueError(f"--data {word!r}: the name {ALL!r} stands for all kinds together; choose another.")
        found.setdefault(match[1], []).append(match[2])
    return found


STATE_FILE = "trainer_state.json"
_LAYER = re.compile(r"mri/layer_(\d+)")


def training_curves(runs: Sequence[str], shift_step: int | None) -> list[dict[str, Any]]:
    """An entry of "training" for each of `runs`, which are RUN, NAME=RUN or NAME=BEFORE,AFTER.

    RUN: a folder with trainer_state.json, in it or in its newest checkpoint, or such a file. Steps of AFTER count on
    from the end of BEFORE, where the data changes; shift_step is for runs that are a single one. Raises ValueError
    for a log without MRI of layers.
    """
    curves = []
    for run in runs:
        name, _, paths = run.rpartition("=")
        parts = [_imbalance_of(path) for path in paths.split(",")]
        if len({len(layers) for _, layers, _ in parts}) > 1:
            raise ValueError(f"--log_history {run!r} joins runs of models with different numbers of MoE layers.")
        steps, layers = [], [[] for _ in parts[0][1]]
        shift, offset = shift_step, 0
        for place, (own_steps, own_layers, _) in enumerate(parts):
            if place == 1:
                shift = offset + 1
            steps += [offset + step for step in own_steps]
            for layer, values in zip(layers, own_layers, strict=True):
                layer += values
            offset = steps[-1]
        label = name or Path(paths.split(",")[-1]).name
        curves.append(imbalance_curve(label, steps, layers, ideal=parts[0][2], shift_step=shift))
    return curves


def _imbalance_of(run: str) -> tuple[list[int], list[list[float]], float]:
    """Steps, MRI of each layer at each of them, and the ideal K/E as the mean over layers."""
    path = _state_of(run)
    with reading(f"--log_history: {path}", "name the state of a trainer"):
        return _imbalance_in(read_json(path, log_history=list[dict])["log_history"], path)


def _imbalance_in(history: list[dict[str, Any]], path: Path) -> tuple[list[int], list[list[float]], float]:
    entries = {entry["step"]: entry for entry in history if "mri/layer_00" in entry}  # the last one of a step
    if not entries:
        raise ValueError(
            f"--log_history: {path} holds no MRI of layers: train with CPTTrainer, or add RouterMonitorCallback."
        )
    logged = [value for entry in entries.values() for key, value in entry.items() if _LAYER.fullmatch(key)]
    if not all(math.isfinite(value) for value in logged):
        raise ValueError(f"--log_history: {path} holds MRI that is no finite number: name the log of a sound run.")
    steps = sorted(entries)
    first = entries[steps[0]]
    keys = sorted((key for key in first if _LAYER.fullmatch(key)), key=lambda key: int(_LAYER.fullmatch(key)[1]))
    ideals = [first[key] / first[key.replace("mri/", "mri_normalized/")] for key in keys]
    return steps, [[entries[step][key] for step in steps] for key in keys], round(sum(ideals) / len(ideals), 9)


def _state_of(run: str) -> Path:
    folder = Path(run).expanduser()
    if folder.is_file():
        return folder
    found = [path for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if path.parent.name[11:].isdigit()]
    newest = sorted(found, key=lambda path: int(path.parent.name[11:]))[-1:]
    path = next((path for path in (folder / STATE_FILE, *newest) if path.is_file()), None)
    if path is None:
        raise ValueError(f"--log_history {run!r} has no {STATE_FILE}: name the output folder of a trainer.")
    return path
