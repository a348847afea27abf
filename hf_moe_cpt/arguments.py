"""Arguments of the scripts: dataclasses on the command line, defaults from a YAML file given with `--config`.

The command line wins over the file, the file over the defaults of the dataclasses. Source: ours, after TRL's scripts.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments

from hf_moe_cpt.recipes import path_of_config


EXPONENT_WITHOUT_DOT = re.compile(r"^[+-]?\d+[eE][+-]?\d+$")


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None,
    *,
    program: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass, filled from `argv` (of the process if None) over the file of `--config`.

    defaults: other defaults than the dataclasses'; file and command line win over them. Raises ValueError for a file
    that cannot be read and for keys in it that no argument has.
    """
    parser = HfArgumentParser(
        list(dataclass_types), prog=program, description=description, allow_abbrev=False, conflict_handler="resolve"
    )
    parser.add_argument("--config", help="YAML file with arguments, or recipe:NAME; the command line wins over it.")
    known = {option.name for kind in dataclass_types for option in dataclasses.fields(kind) if option.init}
    parser.set_defaults(**(defaults or {}))
    path = _given(argv, "config").config
    if path is not None:
        values = read_config(path, known)
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    *parsed, _ = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    return tuple(parsed)


def read_config(path: str | Path, known: set[str]) -> dict[str, Any]:
    """The mapping in a YAML file, whose keys must all be in `known`."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {str(path)!r} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {str(path)!r} must hold `argument: value` lines, got {type(values).__name__}.")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "see --help for the arguments."
            raise ValueError(f"--config {str(path)!r} sets {key!r}, which is no argument: {remedy}")
    return {key: _plain_number(value) for key, value in values.items()}


def _plain_number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text because it has no dot; people write it everywhere."""
    return float(value) if isinstance(value, str) and EXPONENT_WITHOUT_DOT.match(value) else value


def given_values(argv: Sequence[str] | None, *names: str) -> dict[str, Any]:
    """What command line or file say of some arguments, before everything is parsed; None for what neither names.

    Values of the command line are text.
    """
    found = _given(argv, "config", *names)
    try:
        of_file = {} if found.config is None else yaml.safe_load(Path(found.config).read_text()) or {}
    except (OSError, yaml.YAMLError):
        of_file = {}  # `parse_arguments` says what is wrong with it
    typed = {name: getattr(found, name) for name in names}
    return {name: of_file.get(name) if value is None else value for name, value in typed.items()}


def _given(argv: Sequence[str] | None, *names: str) -> argparse.Namespace:
    """Text of `config` and other arguments on the command line; a recipe's name has become its path."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        finder.add_argument(f"--{name}")
    found = finder.parse_known_args(None if argv is None else list(argv))[0]
    if found.config is not None:
        found.config = path_of_config(found.config)
    return found


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The object in `text`, an empty one for None. Raises ValueError, naming the option, for anything else."""
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option} {text!r} must be a JSON object of name: value.")
    return values


@dataclass
class ParallelArguments:
    """How a model is dealt to the ranks that were started; with none of these, accelerate decides."""

    ep_size: int | None = field(
        default=None, metadata={"help": "Expert parallelism: the experts of a layer are dealt to so many ranks."}
    )
    tp_size: int | None = field(
        default=None, metadata={"help": "Tensor parallelism: so many ranks share every matrix and the same rows."}
    )
    dp_replicate_size: int | None = field(
        default=None, metadata={"help": "Copies of the model, for several machines; inside of one it is sharded."}
    )


def fsdp2_arguments(layer_class: str, **more: Any) -> dict[str, Any]:
    """Fields of `TrainingArguments` that shard a model by FSDP2, layer by layer; `more` goes into `fsdp_config`."""
    wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [layer_class]}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrapped, **more}}


def parallel_options(
    args: ParallelArguments, training: TrainingArguments, num_ranks: int | None = None
) -> dict[str, Any]:
    """The argument of `from_pretrained` that deals a model to all ranks; empty where nothing is asked for.

    Ranks that neither tensors nor copies take share the model by FSDP2, which is data parallelism. num_ranks: those
    that were started if None. Raises ValueError for sizes that do not fit them, for two engines at once, and for
    checkpoints that cannot be written.
    """
    sizes = {name: value for name, value in vars(args).items() if value is not None}
    if not sizes:
        return {}
    asked = ", ".join(f"--{name} {value}" for name, value in sizes.items())
    num_ranks = training.world_size if num_ranks is None else num_ranks
    taken = sizes.get("tp_size", 1) * sizes.get("dp_replicate_size", 1)
    if min(sizes.values()) < 1 or num_ranks % taken:
        raise ValueError(f"{asked} does not fit {num_ranks} rank(s): their product must divide the number of ranks.")
    if training.fsdp or training.deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(f"{asked} and FSDP or DeepSpeed both shard the model: start with scripts/accelerate/ep.yaml.")
    is_saved = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    if is_saved and not training.save_only_model:
        raise ValueError(
            f"{asked}: transformers does not save the optimizer of such a model: set --save_only_model or "
            "--save_strategy no, or train with FSDP2 (scripts/accelerate/fsdp2_8gpu.yaml), which resumes."
        )
    return {"distributed_config": _distributed_config(sizes, num_ranks // taken, asked)}


def _distributed_config(sizes: dict[str, int], fsdp_size: int, asked: str) -> Any:
    from transformers.distributed import DistributedConfig

    unknown = [name for name in sizes if name not in inspect.signature(DistributedConfig).parameters]
    if unknown:
        raise ValueError(f"--{unknown[0]} needs transformers 5.23 or newer.")
    try:
        return DistributedConfig(fsdp_size=fsdp_size, **sizes)
    except ValueError as error:
        raise ValueError(f"{asked} on {fsdp_size} data parallel rank(s): {error}") from error
