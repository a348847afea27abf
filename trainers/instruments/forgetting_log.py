"""The losses that forgetting and adaptation are measured against, from a Trainer's log. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def starting_losses(log_history: Iterable[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The first `eval_<name>_loss` logged at step 0, for each of `names` that has one.

    The log is saved in every checkpoint, so a resumed run finds the losses of the model it started from.
    """
    found: dict[str, float] = {}
    for entry in log_history:
        for name in names:
            if entry.get("step") == 0 and f"eval_{name}_loss" in entry:
                found.setdefault(name, entry[f"eval_{name}_loss"])
    return found
