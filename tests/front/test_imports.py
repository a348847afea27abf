"""Every file of the package can be imported, whatever releases are installed (`make test-versions` runs this too)."""

import importlib
from pathlib import Path

import pytest

import hf_moe_cpt


ROOMS = {"": Path(hf_moe_cpt.__file__).parent}
ROOMS |= {
    f".{room}": Path(importlib.import_module(f"hf_moe_cpt.{room}").__file__).parent
    for room in ("modeling", "scripts", "trainers")
}
MODULES = sorted(
    f"hf_moe_cpt{prefix}" + "".join(f".{part}" for part in file.relative_to(folder).with_suffix("").parts)
    for prefix, folder in ROOMS.items()
    for file in folder.rglob("*.py")
    if file.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported(module: str) -> None:
    assert importlib.import_module(module).__doc__
