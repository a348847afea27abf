"""The old name of `hf_moe_cpt.routing` and `hf_moe_cpt.reports`, for one release: each name warns where it is now."""

import importlib
import warnings


_ROOMS = ("hf_moe_cpt.routing", "hf_moe_cpt.reports")


def __getattr__(name: str) -> object:
    for room in map(importlib.import_module, _ROOMS):
        if name in room.__all__:
            warnings.warn(
                f"hf_moe_cpt.analysis is gone in the next release: import {name} from {room.__name__}.",
                DeprecationWarning,
                stacklevel=2,
            )
            globals()[name] = getattr(room, name)
            return globals()[name]
    raise AttributeError(f"module 'hf_moe_cpt.analysis' has no attribute {name!r}: see {' and '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(name for room in map(importlib.import_module, _ROOMS) for name in room.__all__)
