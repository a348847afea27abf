"""A command-line option that holds a JSON object, such as `--overrides '{"num_hidden_layers": 2}'`. Source: ours."""

from __future__ import annotations

import json
from typing import Any


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The object in `text`, an empty one for None. Raises ValueError, naming the option, for anything else."""
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option} {text!r} must be a JSON object of name: value.")
    return values
