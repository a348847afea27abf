"""What is read from files: any error becomes one line that names the file, and weights are those that were saved.

Readers of other libraries raise whatever their code trips over: KeyError for a configuration of another kind,
RecursionError for JSON that is nested too deeply, errors of Rust for weights that are cut short. `reading` is the
boundary around each of them. Source: ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from hf_moe_cpt.machine import local_part
from hf_moe_cpt.settings import fits, named


INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARD = re.compile(r"\w[\w.-]*\.safetensors")
MAX_LAYERS = 10_000  # a model on the meta device takes some ms a layer: more would look as if it hung
# Not about what is in a file: the machine, the network, what is installed.
_ELSEWHERE = (MemoryError, torch.OutOfMemoryError, ConnectionError, ImportError)


@contextmanager
def reading(
    what: object, remedy: str = "save it again, or fetch it again", keeps: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Errors of the block as ValueError in one line, with what is read and what to do.

    An error that names `what` already, of a kind in `keeps`, or about memory, network or packages, is raised as it is.
    """
    try:
        yield
    except (*_ELSEWHERE, *keeps):
        raise
    except Exception as error:
        if isinstance(error, ValueError | OSError) and str(what) in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        kind = "" if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{what} cannot be used ({': '.join(filter(None, (kind, reason)))}): {remedy}.") from error


def read_json(path: str | Path, **fields: Any) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the names of file and field for anything else.

    fields: the type of each that it may hold, such as int, list[float] or Literal["a", "b"]; a float is finite.
    """
    with reading(path):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(found).__name__}: save it again, or fetch it again."
        )
    for name, kind in fields.items():
        wants_number = float in (kind, *get_args(kind))
        if name in found and not (fits(found[name], kind) and (not wants_number or _is_finite(found[name]))):
            said = " ".join(repr(found[name])[:100].split())
            raise ValueError(f"{path}: {name}={said} is no {named(kind)}: save it again, or fetch it again.")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of json: ValueError for a key given twice, of which the last would win unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _is_finite(value: Any) -> bool:
    """Whether a number, or all in a list or among the values of an object, are neither NaN nor infinite."""
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(number is None or math.isfinite(number) for number in numbers)


def shards_of(path: Path) -> dict[str, str]:
    """Tensor -> shard, as an index says. Raises ValueError for one without a map, or that leaves its folder."""
    placed = read_json(path, weight_map=dict).get("weight_map")
    if not placed:
        raise ValueError(f"{path} has no weight_map: save the checkpoint again.")
    for name, shard in placed.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(
                f"{path} places {name!r} in {shard!r}: allowed are safetensors files beside it; save the checkpoint "
                "again, or do not trust it."
            )
    return placed


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file()


def read_adapter(folder: str | Path, wanted: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and weights of an adapter; ValueError where one is missing, of another form, or not finite.

    wanted: names that must be among the weights; half of a pair of LoRA must have the other half.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    kinds = {"peft_type": str, "r": int, "lora_alpha": int | float, "use_rslora": bool | None}
    config = {"r": 8, "lora_alpha": 8} | read_json(Path(folder) / ADAPTER_CONFIG, **kinds)  # what peft takes unsaid
    if not (config["r"] > 0 and config["lora_alpha"] > 0):
        raise ValueError(f"{folder}: r={config['r']} and lora_alpha={config['lora_alpha']} must be above 0.")
    with reading(path):
        weights = load_file(path)
        halves = {name.replace("lora_A", "lora_B") for name in weights if "lora_A" in name}
        halves |= {name.replace("lora_B", "lora_A") for name in weights if "lora_B" in name}
        if missing := sorted({*wanted, *halves} - {*weights}):
            raise ValueError(f"{missing[0]} is not in its weights, and would be random")
        for name, weight in weights.items():
            _require_finite(name, weight)
    return config, weights


def refuse_adapter(name: str | Path) -> None:
    """Raise ValueError for the folder of an adapter alone, where a whole model is wanted."""
    if is_adapter(name):
        raise ValueError(
            f"{str(name)!r} is an adapter, and a whole model is wanted: merge it into its base first "
            "(merge_and_unload of PEFT), and name the folder of the result."
        )


def read_generation_config(name: str | Path, **options: Any) -> GenerationConfig | None:
    """The generation configuration of a folder or Hub id, None where the model comes without one."""
    with reading(f"the generation configuration of {str(name)!r}"):
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options) is None:
            return None
        found = GenerationConfig.from_pretrained(name, **options)
        if not fits(found.eos_token_id, int | list[int] | None):
            raise ValueError(f"eos_token_id={found.eos_token_id!r} is no int or list of them")
        return found


def read_config(name: str | Path, **options: Any) -> PreTrainedConfig:
    """The configuration of a folder or Hub id, as AutoConfig reads it; numbers that no model has are refused."""
    refuse_adapter(name)
    with reading(f"the configuration of {str(name)!r}"):
        config = AutoConfig.from_pretrained(name, **options)
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if num_layers is not None and not 0 < num_layers <= MAX_LAYERS:
            raise ValueError(f"num_hidden_layers={num_layers} is outside [1, {MAX_LAYERS}]")
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures={names!r} is no list of names")
        require_numbers(config.to_dict())
    return config


def require_numbers(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that is NaN, which JSON may hold."""
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name}={value} is no number")


def read_tokenizer(name: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, as AutoTokenizer reads it."""
    with reading(f"the tokenizer of {str(name)!r}"):
        return AutoTokenizer.from_pretrained(name, **options)


def read_model(kind: type, name: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, as the Auto class `kind` reads it.

    Raises ValueError, in one line, for weights that are cut short, are not there, have another shape than the
    configuration says, or are no finite numbers: transformers would draw the missing ones at random.
    """
    _check_config(name, options)
    with reading(f"the model {str(name)!r}"):
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        check_found(found)
        require_finite(model)
    return model


def check_weights(kind: type, name: str | Path, may_hold_more: bool = True, **options: Any) -> None:
    """What `read_model` refuses, without reading a value: for those who read the model themselves.

    may_hold_more: whether tensors pass that the model does not use.
    """
    _check_config(name, options)
    with reading(f"the model {str(name)!r}"):
        _, found = kind.from_pretrained(
            name, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
        )
        check_found(found)
        if not may_hold_more and (unused := sorted(found["unexpected_keys"])):
            raise ValueError(f"{unused[0]!r} is in its weights, and the model has no such tensor")


def require_finite(model: nn.Module) -> None:
    """Raise ValueError for a weight that holds NaN or infinity."""
    for name, weight in model.named_parameters():
        _require_finite(name, local_part(weight))


def _require_finite(name: str, weight: torch.Tensor) -> None:
    if weight.is_floating_point() and weight.itemsize > 1 and weight.numel() and not weight.is_meta:
        if not all(bound.isfinite() for bound in weight.detach().aminmax()):
            raise ValueError(f"{name} holds values that are no finite numbers")


def _check_config(name: str | Path, options: dict[str, Any]) -> None:
    """Refuse the numbers of a folder's configuration, and places of its index, before a model is made of them."""
    if (Path(name) / "config.json").is_file():
        read_config(name, trust_remote_code=options.get("trust_remote_code", False))
    if (Path(name) / GENERATION_CONFIG_NAME).is_file():
        read_generation_config(name)
    if (Path(name) / INDEX).is_file():
        shards_of(Path(name) / INDEX)


def check_found(found: dict[str, Any]) -> None:
    """Raise ValueError for a weight of another shape, or that would be random, in what `from_pretrained` tells."""
    for name, saved, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{name} has the shape {tuple(saved)}, its configuration says {tuple(wanted)}")
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ValueError(f"{missing[0]}{others} not in its weights, and would be random")
