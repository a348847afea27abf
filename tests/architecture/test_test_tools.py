"""What the other tests lean on works: fresh memory, tolerances, offline libraries, the checkout's rooms."""

import importlib

import huggingface_hub.constants
import pytest
import torch

from tests.helpers.fresh_memory import _filled
from tests.helpers.source_tree import PACKAGE_OF_FOLDER, PROJECT
from tests.helpers.tolerances import RELATIVE_RMS_LIMIT, assert_matches, relative_rms_error


ALLOCATIONS = ("empty(2)", "empty_like(torch.ones(2))", "empty_strided((2,), (1,))", "ones(2).new_empty(2)")


@pytest.mark.parametrize("code", ALLOCATIONS)
def test_fresh_memory_of_ours_is_nan(code: str) -> None:
    assert eval(f"torch.{code}", {"torch": torch, "__name__": "hf_moe_cpt.modeling.experts"}).isnan().all()


def test_fresh_memory_of_others_and_of_integers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert eval("torch.empty(2, dtype=torch.int64)", {"torch": torch, "__name__": "hf_moe_cpt.x"}).shape == (2,)
    monkeypatch.setattr(torch, "empty", _filled(lambda size: torch.zeros(size)))
    assert (eval("torch.empty(2)", {"torch": torch, "__name__": "somebody.else"}) == 0).all()


@pytest.mark.parametrize("dtype", RELATIVE_RMS_LIMIT)
def test_tolerances_pass_rounding_and_stop_mistakes(dtype: torch.dtype) -> None:
    want = torch.randn(1000, dtype=torch.float64)
    assert_matches("rounded", want.to(dtype), want)
    with pytest.raises(AssertionError, match="wrong: relative RMS error"):
        assert_matches("wrong", (want * 1.1).to(dtype), want)


def test_error_is_relative_and_finite_only_if_comparable() -> None:
    ones, zeros = torch.ones(4), torch.zeros(4)
    assert relative_rms_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative_rms_error(zeros, zeros) == 0
    assert relative_rms_error(ones, zeros) == float("inf")
    assert relative_rms_error(ones * float("nan"), ones) == float("inf")
    with pytest.raises(ValueError, match=r"shapes differ: got \(4,\), want \(2,\)"):
        relative_rms_error(ones, torch.ones(2))


def test_libraries_are_offline() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("folder, package", PACKAGE_OF_FOLDER.items())
def test_rooms_are_those_of_this_checkout(folder: str, package: str) -> None:
    assert importlib.import_module(package).__file__ == str(PROJECT / folder / "__init__.py")
