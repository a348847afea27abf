"""Settings by type and range, in one place: flags, files and Python are held to the same.

A dataclass says what a field may be by its type, by `choices`, and by `range` in its metadata, an interval as text:
"[0, 1)" without the one, "(0, inf)" for any finite number above 0. A number without a range must be finite. NaN is in
no range, and True is no number. Source: ours.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any


# Of fields that other packages declare; the rest of their numbers must be finite.
RANGES = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"), "[0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), "[0, 1)"),
    **dict.fromkeys(("seed", "data_seed"), "[0, 4294967296)"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, 1048576]"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), "[1, 1048576]"),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), "(0, inf)"),
    **dict.fromkeys(("warmup_steps", "save_total_limit", "eval_delay", "torch_empty_cache_steps"), "[0, inf)"),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc"), "[0, 1024]"),
    "warmup_ratio": "[0, 1]",
    "max_grad_norm": "[0, inf]",
    "max_steps": "[-1, inf)",
    "ddp_timeout": "[1, 31536000]",
    "dataloader_prefetch_factor": "[1, 1024]",
    **dict.fromkeys(("ddp_bucket_cap_mb", "precompute_ref_batch_size", "ref_model_sync_steps"), "[1, inf)"),
    "pad_to_multiple_of": "[1, inf)",
    "neftune_noise_alpha": "[0, inf)",
    "ref_model_mixup_alpha": "[0, 1]",
    "max_length": "[1, inf)",
}
CHOICES = {"torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")}
_NUMBERS = (bool, int, float, types.NoneType)
_OF_NUMBERS = {bool: "bool", int: "int", float: "float"}


def check_settings(settings: Any) -> None:
    """Raise ValueError for the first number or switch of a dataclass's instance of another type or out of its range.

    For the beginning of `__post_init__`: what is no number may still be in the form of another package.
    """
    kinds = _hints(type(settings))
    for field in dataclasses.fields(settings):
        if set(_alternatives(kinds[field.name])) <= set(_NUMBERS):
            value = getattr(settings, field.name)
            _check(field, kinds[field.name], value, f"{field.name}={value!r}")


def check_values(kind: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the values, by field of the dataclass `kind`, that its field does not allow.

    For values of a command line or a file: names are told as --options.
    """
    kinds = _hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in values:
            _check(field, kinds[field.name], values[field.name], f"--{field.name} {values[field.name]!r}")


def wants_list(kind: type, name: str) -> bool:
    """Whether a field of the dataclass holds several values."""
    return any(typing.get_origin(hint) is list for hint in _alternatives(_hints(kind)[name]))


def is_in_range(value: float, interval: str) -> bool:
    """Whether the number lies in an interval such as "(0, 1]"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def _check(field: dataclasses.Field, hint: Any, value: Any, told: str) -> None:
    if not fits(value, hint):
        raise ValueError(f"{told} is no {named(hint)}{_help(field)}")
    if field.name.endswith("_kwargs") and isinstance(value, str) and not _is_json_object(value):
        raise ValueError(f"{told} is no JSON object{_help(field)}")
    choices = field.metadata.get("choices", CHOICES.get(field.name))
    if choices is not None and value is not None and value not in choices:
        raise ValueError(f"{told} is unknown: choose from {', '.join(map(str, choices))}.")
    interval = field.metadata.get("range") or RANGES.get(field.name)
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            continue
        if interval is not None and not is_in_range(number, interval):
            raise ValueError(f"{told} is outside {interval}{_help(field)}")
        if not math.isfinite(number) and interval is None:
            raise ValueError(f"{told} is no finite number{_help(field)}")
        if not -(2**63) <= number < 2**63 and isinstance(number, numbers.Integral):
            raise ValueError(f"{told} has more than 64 bits{_help(field)}")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _help(field: dataclasses.Field) -> str:
    """What the setting is, to follow a refusal."""
    text = " ".join((field.metadata.get("help") or "").replace("%%", "%").split())
    return f": {text[0].lower()}{text[1:].rstrip('.')}." if text and len(text) < 200 else "."


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def named(hint: Any) -> str:
    """A type in words: "int or str"; None, which many may be, goes without saying."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    return " or ".join(
        str(kind) if typing.get_args(kind) else _OF_NUMBERS.get(kind, getattr(kind, "__name__", str(kind)))
        for kind in kinds
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether the value is of a type; what types of other packages may hold is theirs to say."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is list or hint is list:
        parts = typing.get_args(hint) or (Any,)
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    if origin is dict or hint is dict:
        parts = typing.get_args(hint) or (Any, Any)
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if hint in (int, float):
        wanted = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike | enum.Enum)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, hint) or value in [member.value for member in hint]
    if hint in (bool, types.NoneType):
        return isinstance(value, hint)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    return not isinstance(hint, type) or isinstance(value, (hint, str, dict))
