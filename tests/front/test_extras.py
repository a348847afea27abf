"""A missing optional package is named together with what installs it."""

import configparser

import pytest

from hf_moe_cpt import extras
from tests.helpers.source_tree import PROJECT


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRA_OF_PACKAGE, "package_nobody_wrote", "kernels")
    message = r"RainbowPO needs the package package_nobody_wrote, .* pip install 'hf_moe_cpt\[kernels\]'"
    with pytest.raises(ImportError, match=message):
        extras.require("package_nobody_wrote", needed_by="RainbowPO")
    assert not extras.is_installed("package_nobody_wrote")


def test_installed_package_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRA_OF_PACKAGE, "json", "kernels")
    assert extras.require("json", needed_by="a test").dumps([1]) == "[1]"
    assert extras.is_installed("json")


def test_error_inside_a_package_is_not_called_missing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_that_breaks.py").write_text("import package_nobody_wrote\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.EXTRA_OF_PACKAGE, "package_that_breaks", "kernels")
    with pytest.raises(ModuleNotFoundError, match="No module named 'package_nobody_wrote'"):
        extras.require("package_that_breaks", needed_by="a test")


@pytest.mark.parametrize("function", [extras.is_installed, lambda name: extras.require(name, needed_by="a test")])
def test_unlisted_package_is_refused(function) -> None:
    with pytest.raises(ValueError, match="'numpy' is not an optional package: choose from bitsandbytes, evaluate"):
        function("numpy")


def test_every_extra_exists_and_brings_its_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    for package, extra in extras.EXTRA_OF_PACKAGE.items():
        assert package.replace("_", "-") in setup["options.extras_require"][extra]
        assert f",{extra}" in setup["options.extras_require"]["all"].replace("[", ",")
