"""setup.cfg lists what is in the folders, and a wheel holds it under our own name only."""

import configparser
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import hf_moe_cpt
from hf_moe_cpt.extras import EXTRA_OF_PACKAGE
from tests.architecture.rooms import ROOMS
from tests.helpers.fresh_process import run_python
from tests.helpers.source_tree import PACKAGE_OF_FOLDER, PROJECT, read_project


NEEDED_BY_OTHERS = {"accelerate"}  # transformers' Trainer asks for it
SHIPPED = {folder: package for folder, package in PACKAGE_OF_FOLDER.items() if folder != "tests"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(PROJECT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel, built from a copy so that nothing is left in the checkout."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for folder in SHIPPED:
        shutil.copytree(PROJECT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / file, copy)
    run_python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built), str(copy))
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return archive.namelist()


def _is_scratch(path: Path) -> bool:
    """Caches of Python and of tools, wherever they lie."""
    return any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(PROJECT).parts)


def words(text: str) -> list[str]:
    return text.split()


def test_every_folder_with_code_is_a_listed_package(setup: configparser.ConfigParser) -> None:
    found = {file.package for file in read_project() if not file.is_test}
    assert set(words(setup["options"]["packages"])) == found


def test_every_package_opens_with_its_init() -> None:
    files = [file for file in read_project() if not file.is_test]
    opened = {file.package for file in files if file.path.endswith("/__init__.py")}
    assert {file.package for file in files} - opened == set()


def test_every_room_of_the_table_exists() -> None:
    assert set(ROOMS) <= {file.package for file in read_project()}


def test_folders_are_mapped_as_the_path_line_maps_them(setup: configparser.ConfigParser) -> None:
    mapped = dict(re.findall(r"(\S+) = (\S+)", setup["options"]["package_dir"]))
    assert mapped == {package: folder for folder, package in SHIPPED.items() if package != "hf_moe_cpt"}


def test_every_other_import_is_a_requirement(setup: configparser.ConfigParser) -> None:
    """What the code imports is what pip installs, no more and no less; what extras bring aside."""
    required = {re.split(r"[<>=;]", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    imported = {
        found.module.partition(".")[0]
        for file in read_project()
        if not file.is_test
        for found in file.imports()
        if found.level == 0
    }
    imported -= sys.stdlib_module_names | {"hf_moe_cpt"} | set(EXTRA_OF_PACKAGE)
    assert {name.replace("yaml", "pyyaml") for name in imported} | NEEDED_BY_OTHERS == required


def test_requirements_have_exact_versions_in_the_constraints(setup: configparser.ConfigParser) -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    listed = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    for line in listed.split("\n"):
        name = re.split(r"[<>=;]", line.strip())[0].replace("_", "-")
        if name == "triton":  # torch's wheels for GPUs name the exact one that they were built with
            continue
        assert not name or name in pinned, f"{name} has no exact version in constraints.txt"
    assert "+" not in "".join(pinned.values()), "a local version such as +cpu exists on one index only"


def test_wheel_holds_every_file_and_only_our_name(wheel: list[str]) -> None:
    expected = {
        f"{SHIPPED[folder].replace('.', '/')}/{path.relative_to(PROJECT / folder).as_posix()}"
        for folder in SHIPPED
        for path in (PROJECT / folder).rglob("*")
        if path.is_file() and not _is_scratch(path)
    }
    shipped = {name for name in wheel if ".dist-info/" not in name}
    assert shipped == expected
    assert {name.partition("/")[0] for name in wheel} == {
        "hf_moe_cpt",
        f"hf_moe_cpt-{hf_moe_cpt.__version__}.dist-info",
    }


def test_ci_runs_what_a_person_runs() -> None:
    assert Path(PROJECT / ".ci/run").read_text().strip().endswith("make test")
