"""Packages show their names, load each from its room when it is asked for, and refuse others; old names say where."""

import importlib

import pytest


PACKAGES = ("hf_moe_cpt", "hf_moe_cpt.routing")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_the_rooms_own(package: str) -> None:
    front = importlib.import_module(package)
    assert set(front.__all__) <= set(dir(front))
    for name in front.__all__:
        home = importlib.import_module(getattr(front, name).__module__)
        assert home.__name__ != package and getattr(front, name) is getattr(home, name)


@pytest.mark.parametrize("package", (*PACKAGES, "hf_moe_cpt.reports", "hf_moe_cpt.analysis"))
def test_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'CptMoeForVision'"):
        _ = importlib.import_module(package).CptMoeForVision
