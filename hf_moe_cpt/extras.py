"""Optional packages, by the extra that brings them: imported when they are asked for."""

import importlib
from importlib.util import find_spec
from types import ModuleType


EXTRA_OF_PACKAGE = {
    "bitsandbytes": "quantised",
    "evaluate": "evaluate",
    "liger_kernel": "liger",
    "peft": "peft",
    "triton": "kernels",
    "trl": "rainbowpo",
}


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported, without importing it. Unknown names raise ValueError."""
    _check_known(package)
    return find_spec(package) is not None


def require(package: str, needed_by: str) -> ModuleType:
    """Import an optional package, or say who needs it and how to install it.

    needed_by: what the user asked for, as they know it ("RainbowPOTrainer", "--optim ..."). Raises ImportError.
    """
    _check_known(package)
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        extra = EXTRA_OF_PACKAGE[package]
        raise ImportError(
            f"{needed_by} needs the package {package}, which is not installed: pip install 'hf_moe_cpt[{extra}]'."
        ) from error


def _check_known(package: str) -> None:
    if package not in EXTRA_OF_PACKAGE:
        raise ValueError(f"{package!r} is not an optional package: choose from {', '.join(sorted(EXTRA_OF_PACKAGE))}.")
