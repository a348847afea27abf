"""The front door shows its names, loads each from its room and refuses others."""

import importlib

import pytest

import hf_moe_cpt


@pytest.mark.parametrize("name", hf_moe_cpt.__all__)
def test_public_name_is_the_rooms_own(name: str) -> None:
    home = importlib.import_module(hf_moe_cpt._HOME_OF_NAME[name])
    assert getattr(hf_moe_cpt, name) is getattr(home, name)
    assert getattr(hf_moe_cpt, name).__module__ == home.__name__


def test_names_are_listed_and_complete() -> None:
    assert set(hf_moe_cpt._HOME_OF_NAME) == set(hf_moe_cpt.__all__)
    assert set(hf_moe_cpt.__all__) <= set(dir(hf_moe_cpt))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_moe_cpt' has no attribute 'CptMoeForVision'"):
        _ = hf_moe_cpt.CptMoeForVision
