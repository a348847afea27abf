"""The metrics that `evaluate` loads, a folder each: of routing, of preferences, of what a surgery did."""

from pathlib import Path


def metric_folder(name: str) -> str:
    """What `evaluate.load` takes for the metric `name`, such as "router_saturation"; its card lies there.

    Raises ValueError for an unknown name.
    """
    known = {path.parent.name: str(path.parent) for path in Path(__file__).parent.glob("*/README.md")}
    if name not in known:
        raise ValueError(f"{name!r} is no metric: choose from {', '.join(sorted(known))}.")
    return known[name]
