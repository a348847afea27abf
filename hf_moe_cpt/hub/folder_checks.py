"""What a folder must be before it is published: a whole checkpoint that loads anywhere, with no secret in it.

Nothing is executed or unpickled: JSON is parsed and safetensors headers are checked against the sizes of their files.
Source: ours.
"""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# What a Trainer leaves in a folder and nobody needs to load the model; pickled files may hold a token.
NOT_PUBLISHED = (
    ".*",
    "_*",
    "checkpoint-*",
    "global_step*",
    "last-checkpoint",
    "logs",
    "optimizer*.pt",
    "pytorch_model*.bin",
    "reference",
    "rng_state*.pth",
    "runs",
    "scaler.pt",
    "scheduler.pt",
    "training_args.bin",
    "*.partial",
    "*.pyc",
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_TEXT_ENDINGS = {".json", ".md", ".py", ".txt", ".yaml", ".yml", ".csv", ".jinja"}
_SIBLING_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def published_files(folder: str | Path) -> list[str]:
    """Paths below `folder` that are published, sorted; optimizer states, checkpoints and pickles are not."""
    root = Path(folder)
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(map(_is_left_out, path.parts)))


def _is_left_out(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_PUBLISHED)


def check_checkpoint(folder: str | Path, needs_tokenizer: bool = True) -> None:
    """Raise ValueError, in one line, for the first reason why `folder` would not load where it is published.

    needs_tokenizer: whether a folder without a tokenizer is refused.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: name the folder of a saved model.")
    is_adapter = not (root / CONFIG).is_file() and (root / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (root / CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} is no checkpoint: it holds no {CONFIG}{_place_of_checkpoint(root)}.")
    config = read_json(root / (ADAPTER_CONFIG if is_adapter else CONFIG))
    if is_adapter:
        _check_adapter(root, config)
        _check_opens(root / ADAPTER_WEIGHTS)
    else:
        _check_weights(root)
        _check_code(root, config)
    if needs_tokenizer and not any((root / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer: save one into it, or publish without (--without_tokenizer)."
        )
    _check_secrets(root)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else raises ValueError with the file's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON ({error}): save the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(value).__name__}.")
    return value


def _place_of_checkpoint(root: Path) -> str:
    inside = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    return f" (but {inside[-1]!r} inside does: publish that one, or save the model)" if inside else ""


def _check_adapter(root: Path, config: dict[str, Any]) -> None:
    """An adapter names a base that others can load, and no class that only we can import."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base) or Path(base).exists():
        raise ValueError(
            f"{str(root / ADAPTER_CONFIG)!r} names the base {base!r}, which is no Hub id: publish the base and set "
            "base_model_name_or_path to its id, or publish the merged model (merge_and_unload)."
        )
    library = (config.get("auto_mapping") or {}).get("parent_library") or ""
    if library.partition(".")[0] in ("hf_moe_cpt", "transformers_modules"):
        raise ValueError(
            f"{str(root / ADAPTER_CONFIG)!r} names the class of its base by the module {library!r}, which others "
            'cannot import: give the adapter task_type="CAUSAL_LM" and save it again.'
        )


def _check_weights(root: Path) -> None:
    if (root / INDEX).is_file():
        _check_shards(root, read_json(root / INDEX))
    elif (root / WEIGHTS).is_file():
        _check_opens(root / WEIGHTS)
    else:
        pickled = next(root.glob("pytorch_model*.bin"), None)
        what = f"only {pickled.name}" if pickled else "no weights"
        raise ValueError(f"{str(root)!r} holds {what}: save the model as safetensors (save_pretrained does).")


def _check_shards(root: Path, index: dict[str, Any]) -> None:
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{str(root / INDEX)!r} has no weight_map: save the checkpoint again.")
    for shard in sorted(set(placed.values())):
        there = _check_opens(root / shard)
        missing = next((name for name, file in placed.items() if file == shard and name not in there), None)
        if missing:
            raise ValueError(
                f"{str(root / shard)!r} lacks the tensor {missing!r} that {INDEX} places there: save the "
                "checkpoint again."
            )


def _check_opens(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file whose header agrees with the size of the file."""
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} lacks {path.name}: save the checkpoint again.")
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt or cut short ({error}): save the checkpoint again, or copy it anew."
        ) from error


def _check_code(root: Path, config: dict[str, Any]) -> None:
    """The files that `auto_map` names are there, with all that they import from beside them."""
    places = config.get("auto_map") or {}
    if config.get("model_type") == "cpt_moe" and not {"AutoConfig", "AutoModelForCausalLM"} <= set(places):
        raise ValueError(
            f"{str(root / CONFIG)!r} has no auto_map, so the model would load only where hf_moe_cpt is installed: "
            "save it with save_pretrained."
        )
    named = [place for value in places.values() for place in ([value] if isinstance(value, str) else value) if place]
    waiting = [place.rpartition(".")[0] for place in named if "--" not in place]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = root / f"{module}.py"
        if not path.is_file():
            raise ValueError(
                f"{str(root)!r} lacks {path.name}, which its config needs to load elsewhere: save the model "
                "with save_pretrained, which copies the code."
            )
        waiting += _SIBLING_IMPORT.findall(path.read_text(encoding="utf-8"))


def _check_secrets(root: Path) -> None:
    for name in published_files(root):
        path = root / name
        if path.suffix in _TEXT_ENDINGS and _TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{str(path)!r} holds what looks like a Hub token: remove it, and revoke the token.")
