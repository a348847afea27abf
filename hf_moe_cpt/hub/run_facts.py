"""What a finished folder says about the run that made it: read from its JSON files, never from a pickle.

Files: config.json or adapter_config.json (the model), training_run.json (arguments, parents, machine, versions;
written by our trainers), trainer_state.json (the log), all_results.json (the last evaluation), cpt_state.json,
rainbowpo.json and surgery.json (what a method keeps). Each may be missing; then the card is silent about it. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_moe_cpt.hub.folder_checks import ADAPTER_CONFIG, CONFIG, HUB_ID, read_json


RUN_FILE = "training_run.json"
METHODS = ("cpt", "rainbowpo", "surgery")
_METHOD_OF_FILE = {"cpt_state.json": "cpt", "rainbowpo.json": "rainbowpo", "surgery.json": "surgery"}
# Of the training log: how many tokens went through the model, by the trainer's name for it.
_TOKEN_COUNTS = ("tokens_seen", "num_tokens", "num_input_tokens_seen")


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

    def last(self, name: str) -> float | None:
        """The last logged value of a measure of training."""
        return next((entry[name] for entry in reversed(self.log) if name in entry), None)


def read_facts(folder: str | Path, method: str | None = None) -> RunFacts:
    """Everything a folder says about its run.

    method: which of METHODS made it, if the folder does not say. Raises ValueError for a folder without a model, an
    unreadable file, an unknown method, or one that neither `method` nor the folder tells.
    """
    root = Path(folder)
    if not any((root / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ValueError(f"{str(folder)!r} holds neither {CONFIG} nor {ADAPTER_CONFIG}: name the folder of a model.")
    state, run, results = (_optional(root / name) for name in ("trainer_state.json", RUN_FILE, "all_results.json"))
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
    return read_json(path) if path.is_file() else {}


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
