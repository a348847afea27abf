"""Refusals that the metrics share: a configuration or an input that a metric does not have, or one that is missing.

Source: ours; evaluate itself lets a missing column fail where its length is taken.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


def refuse_unknown_inputs(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a line that names what was given and is not known, and what there is."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such input; there are {', '.join(known)}.")


def refuse_missing_inputs(batch: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise a line that names the columns of a batch that were not given."""
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: input missing; give all of {', '.join(needed)}.")


def refuse_unknown_configuration(config_name: str, known: Collection[str]) -> None:
    """Raise a line that names the configurations there are, unless config_name is one of them."""
    if config_name not in known:
        raise ValueError(f"config_name={config_name!r} is unknown: choose from {', '.join(known)}.")
