"""Requirements are what is imported; wheel and source distribution hold what git does, under our own name only."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_moe_cpt
from hf_moe_cpt.extras import EXTRA_OF_PACKAGE
from tests.architecture.rooms import ROOMS
from tests.helpers.fresh_process import run_python
from tests.helpers.source_tree import PACKAGE_OF_FOLDER, PROJECT, read_project
from tests.versions import SUITE, build


NEEDED_BY_OTHERS = {"accelerate"}  # transformers' Trainer asks for it
SHIPPED = {folder: package for folder, package in PACKAGE_OF_FOLDER.items() if folder != "tests"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(PROJECT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The unpacked source distribution, and the wheel that was built from it."""
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def files_of_git() -> set[str]:
    """Paths that git tracks or would add."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (PROJECT / name).is_file()}


def test_every_package_opens_with_its_init() -> None:
    files = [file for file in read_project() if not file.is_test]
    opened = {file.package for file in files if file.path.endswith("/__init__.py")}
    closed = {file.package for file in files} - opened
    assert all(package.startswith("hf_moe_cpt.metrics.") for package in closed), closed  # evaluate loads their folders


def test_every_room_of_the_table_exists() -> None:
    assert set(ROOMS) <= {file.package for file in read_project()}


def test_folders_are_mapped_as_the_path_line_maps_them(setup: configparser.ConfigParser) -> None:
    mapped = dict(re.findall(r"(\S+) = (\S+)", setup["options"]["package_dir"]))
    assert mapped == {package: folder for folder, package in SHIPPED.items() if package != "hf_moe_cpt"}


def test_every_other_import_is_a_requirement(setup: configparser.ConfigParser) -> None:
    """What the code imports is what pip installs, no more and no less; what extras bring aside."""
    required = {re.split(r"[<>=;]", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    imports = [found for file in read_project() if not file.is_test for found in file.imports]
    imported = {found.module.partition(".")[0] for found in imports if found.level == 0}
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


def test_wheel_holds_every_file_and_only_our_name(built: tuple[Path, Path], files_of_git: set[str]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    shipped = [(path, path.partition("/")[0]) for path in files_of_git if path.partition("/")[0] in SHIPPED]
    expected = {path.replace(folder, SHIPPED[folder].replace(".", "/"), 1) for path, folder in shipped}
    assert {name for name in names if ".dist-info/" not in name} == expected
    about = f"hf_moe_cpt-{hf_moe_cpt.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"hf_moe_cpt", about}


def test_source_distribution_holds_what_git_does(built: tuple[Path, Path], files_of_git: set[str]) -> None:
    missing = {path for path in files_of_git if not (built[0] / path).is_file()}
    assert missing == {".gitignore"}


def test_links_of_the_readme_hold_on_an_index(built: tuple[Path, Path]) -> None:
    """Its renderer knows no files of ours, so a link is an address or a heading of the same page."""
    archive = zipfile.ZipFile(built[1])
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    assert "start here (`docs/index.md`)" in metadata
    assert [link for link in re.findall(r"\]\(([^)]+)\)", metadata) if not re.match(r"https?://|#", link)] == []


@pytest.mark.slow
def test_recipes_are_found_in_an_installed_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = "import hf_moe_cpt.arguments as r; print(r.path_of_config('recipe:surgery_safe'))"
    printed = run_python("-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}").stdout.strip()
    assert Path(printed) == tmp_path / "hf_moe_cpt/scripts/recipes/surgery_safe.yaml"
    assert Path(printed).read_bytes() == (PROJECT / "scripts/recipes/surgery_safe.yaml").read_bytes()


def test_every_test_of_the_lanes_exists() -> None:
    for node in SUITE:
        path, _, name = node.partition("::")
        assert (PROJECT / path).exists(), node
        assert not name or f"def {name}(" in (PROJECT / path).read_text(), node


def test_ci_runs_what_a_person_runs() -> None:
    assert Path(PROJECT / ".ci/run").read_text().strip().endswith("make test")
