"""Packages show their names, load each from its room when it is asked for, and refuse others; old names say where."""

import importlib

import pytest

from tests.helpers.fresh_process import run_python


PACKAGES = ("hf_moe_cpt", "hf_moe_cpt.reports", "hf_moe_cpt.routing")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_the_rooms_own(package: str) -> None:
    front = importlib.import_module(package)
    assert set(front.__all__) <= set(dir(front))
    for name in front.__all__:
        home = importlib.import_module(getattr(front, name).__module__)
        assert home.__name__ != package and getattr(front, name) is getattr(home, name)


@pytest.mark.parametrize("package", (*PACKAGES, "hf_moe_cpt.analysis"))
def test_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'CptMoeForVision'"):
        _ = importlib.import_module(package).CptMoeForVision


def test_one_name_loads_what_it_needs_and_its_old_place_warns() -> None:
    program = (
        "import sys\n"
        "from hf_moe_cpt.analysis import recovery_step, Mark\n"
        "print(recovery_step.__module__, Mark.__module__)\n"
        "routing = [name for name in sys.modules if name.startswith('hf_moe_cpt.routing.')]\n"
        "print(routing, 'transformers' in sys.modules)"
    )
    done = run_python("-W", "default::DeprecationWarning", "-c", program)
    assert done.stdout.splitlines() == [
        "hf_moe_cpt.routing.metrics hf_moe_cpt.reports.charts",
        "['hf_moe_cpt.routing.metrics'] False",
    ]
    assert "hf_moe_cpt.analysis is gone in the next release: import Mark from hf_moe_cpt.reports." in done.stderr
