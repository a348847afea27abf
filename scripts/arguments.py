"""Arguments of the scripts: dataclasses on the command line, defaults from a YAML file given with `--config`.

The command line wins over the file, the file over the defaults of the dataclasses. Source: ours, after TRL's scripts.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

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
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
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
