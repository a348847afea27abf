"""A finished folder: what it says about the run that made it, and what it must be before it is published.

Facts: config.json or adapter_config.json (the model), training_run.json (arguments, parents, machine, versions;
written by our trainers), trainer_state.json (the log), all_results.json (the last evaluation), cpt_state.json,
rainbowpo.json and surgery.json (what a method keeps). Each may be missing; then the card is silent about it.

Published is only a whole checkpoint that loads anywhere, with the tensors and shapes that its configuration says and
finite numbers in them. Nothing is executed or unpickled: JSON is parsed, safetensors are read. Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from hf_moe_cpt.hub.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    RUN_FILE,
    TOKENIZER_FILES,
    WEIGHTS,
    check_header,
    code_files,
    read_json,
    require_no_link,
    weight_files,
)
from hf_moe_cpt.reading import INDEX, check_weights, reading, require_numbers, shards_of


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
METHODS = ("cpt", "rainbowpo", "surgery")
_METHOD_OF_FILE = {"cpt_state.json": "cpt", "rainbowpo.json": "rainbowpo", "surgery.json": "surgery"}
# Of the training log: how many tokens went through the model, by the trainer's name for it.
_TOKEN_COUNTS = ("tokens_seen", "num_tokens", "num_input_tokens_seen")


def check_checkpoint(folder: str | Path, needs_tokenizer: bool = True, needs_base: bool = True) -> None:
    """Raise ValueError, in one line, for the first reason why `folder` would not load where it is published.

    needs_tokenizer: whether a folder without a tokenizer is refused. needs_base: whether an adapter is whose base is
    not on the Hub.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: name the folder of a saved model.")
    is_adapter = not (root / CONFIG).is_file() and (root / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (root / CONFIG).is_file():
        inside = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
        where = f" (but {inside[-1]!r} inside does: publish that one, or save the model)" if inside else ""
        raise ValueError(f"{str(folder)!r} is no checkpoint: it holds no {CONFIG}{where}.")
    config = read_json(root / (ADAPTER_CONFIG if is_adapter else CONFIG))
    if is_adapter:
        if needs_base:
            _check_adapter(root, config)
        check_header(root / ADAPTER_WEIGHTS)
    else:
        _check_weights(root)
        _check_code(root, config)
    if needs_tokenizer and not any((root / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer: save one into it, or publish without (--without_tokenizer)."
        )
    if config.get("model_type") in CONFIG_MAPPING and not is_adapter:  # others need code that is not run here
        with _no_progress_bar():  # nothing is read
            how = {"local_files_only": True, "experts_implementation": "eager"}
            check_weights(AutoModelForCausalLM, root, may_hold_more=False, **how)
    for name in sorted(weight_files(root) - {INDEX}):
        require_finite_file(root / name)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def require_finite_file(path: Path) -> None:
    """Raise ValueError for a safetensors file with NaN or infinity in it; a tensor is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            value = file.get_tensor(name)
            if value.is_floating_point() and value.itemsize > 1 and value.numel():
                if not all(bound.isfinite() for bound in value.aminmax()):
                    raise ValueError(
                        f"{str(path)!r}: {name} holds values that are no finite numbers: publish a checkpoint from "
                        "before the run diverged."
                    )


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
    if (root / WEIGHTS).is_file():
        check_header(root / WEIGHTS)
    elif (root / INDEX).is_file():
        _check_shards(root)
    else:
        pickled = next(root.glob("pytorch_model*.bin"), None)
        what = f"only {pickled.name}" if pickled else "no weights"
        raise ValueError(f"{str(root)!r} holds {what}: save the model as safetensors (save_pretrained does).")


def _check_shards(root: Path) -> None:
    require_no_link(root / INDEX)
    placed = shards_of(root / INDEX)
    for shard in sorted(set(placed.values())):
        there = check_header(root / shard)
        missing = next((name for name, file in placed.items() if file == shard and name not in there), None)
        if missing:
            raise ValueError(
                f"{str(root / shard)!r} lacks the tensor {missing!r} that {INDEX} places there: save the "
                "checkpoint again."
            )


def _check_code(root: Path, config: dict[str, Any]) -> None:
    """The files that `auto_map` names are there, with all that they import from beside them."""
    places = config.get("auto_map") or {}
    if config.get("model_type") == "cpt_moe" and not {"AutoConfig", "AutoModelForCausalLM"} <= set(places):
        raise ValueError(
            f"{str(root / CONFIG)!r} has no auto_map, so the model would load only where hf_moe_cpt is installed: "
            "save it with save_pretrained."
        )
    for name in sorted(code_files(root)):
        require_no_link(root / name)
        if not (root / name).is_file():
            raise ValueError(
                f"{str(root)!r} lacks {name}, which its config needs to load elsewhere: save the model "
                "with save_pretrained, which copies the code."
            )


@dataclass
class RunFacts:
    """Facts of a folder, as found.

    method: "cpt", "rainbowpo" or "surgery". config: of the model, or {} for an adapter. adapter: of PEFT, or {}.
    run: training_run.json. log: entries of the training log. final: the last value of each evaluated measure; start:
    its value at step 0. kept: what the method itself kept.
    """

    method: str
    config: dict[str, Any]
    adapter: dict[str, Any]
    run: dict[str, Any]
    log: list[dict[str, Any]]
    state: dict[str, Any]
    final: dict[str, float]
    start: dict[str, float]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the run by name."""
        return self.run.get("arguments") or self.kept.get("settings") or self.kept.get("arguments") or {}

    @property
    def parent(self) -> str | None:
        """Hub id or name of the checkpoint that the run started from; of an adapter first the base that it names."""
        of_adapter = self.adapter.get("base_model_name_or_path")
        if of_adapter and HUB_ID.fullmatch(of_adapter) and not Path(of_adapter).exists():
            return str(of_adapter)
        return self.run.get("started_from") or self.kept.get("started_from") or of_adapter or None

    @property
    def tokens(self) -> int | None:
        """Tokens that went through the model in training."""
        counts = [entry[name] for entry in self.log for name in _TOKEN_COUNTS if entry.get(name)]
        return int(max(counts)) if counts else self.kept.get("tokens_seen")

    @property
    def steps(self) -> int | None:
        """Optimizer steps."""
        return self.state.get("global_step")

    @property
    def seconds(self) -> float | None:
        """Wall clock of the training, as the Trainer measured it."""
        return next((entry["train_runtime"] for entry in reversed(self.log) if "train_runtime" in entry), None)


def read_facts(folder: str | Path, method: str | None = None) -> RunFacts:
    """Everything a folder says about its run.

    method: which of METHODS made it, if the folder does not say. Raises ValueError for a folder without a model, an
    unreadable file, an unknown method, or one that neither `method` nor the folder tells.
    """
    root = Path(folder)
    if not any((root / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ValueError(f"{str(folder)!r} holds neither {CONFIG} nor {ADAPTER_CONFIG}: name the folder of a model.")
    state, run, results = (_optional(root / name) for name in ("trainer_state.json", RUN_FILE, "all_results.json"))
    with reading(root / "trainer_state.json"):
        log = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
    method = method or run.get("method") or _method_of(root, log)
    if method not in METHODS:
        raise ValueError(
            f"{str(folder)!r} does not say which method made it (method={method!r}): choose one of "
            f"{', '.join(METHODS)} with --method."
        )
    kept: dict[str, Any] = {}
    for name, owner in _METHOD_OF_FILE.items():
        kept |= _optional(root / name) if owner == method else {}
    final, start = _evaluated(log)
    measured = kept.get("measured") if isinstance(kept.get("measured"), dict) else {}  # of the weights in the folder
    final |= {f"eval_{name}": value for name, value in measured.items() if isinstance(value, int | float)}
    final |= {name: value for name, value in results.items() if _is_measure(name) and isinstance(value, int | float)}
    return RunFacts(
        method, _optional(root / CONFIG), _optional(root / ADAPTER_CONFIG), run, log, state, final, start, kept
    )


def _optional(path: Path) -> dict[str, Any]:
    facts = read_json(path) if path.is_file() else {}
    with reading(path):
        require_numbers(facts)
    return facts


def _method_of(root: Path, log: list[dict[str, Any]]) -> str | None:
    for name, method in _METHOD_OF_FILE.items():
        if (root / name).is_file():
            return method
    return "surgery" if any("eval_surgery_gap" in entry for entry in log) else None


def _is_measure(name: str) -> bool:
    clocks = ("_runtime", "_per_second", "_preparation_time")
    return (name.startswith("eval_") and not name.endswith(clocks)) or name in ("forgetting", "adaptation")


def _evaluated(log: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    final: dict[str, float] = {}
    start: dict[str, float] = {}
    for entry in log:
        values = {k: v for k, v in entry.items() if _is_measure(k) and isinstance(v, int | float)}
        final |= values
        if entry.get("step") == 0:
            start |= {name: value for name, value in values.items() if name.startswith("eval_")}
    return final, start
