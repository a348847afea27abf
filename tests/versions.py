"""`make test-versions`: the wheel, built and installed as a user's, on the oldest and newest releases that it allows.

Lanes: `lowest` has the minima of setup.cfg, `pinned` has constraints.txt, `newest` is an empty environment into which
the wheel went with nothing pinned. Each has an environment in `.lanes/`. The tests are those of the unpacked source
distribution, without its package folders, so that what they import is the wheel. Without a GPU these have the torch of
constraints.txt: any other comes with gigabytes of CUDA, which the lane `today`, run when named, takes with the rest.

    python tests/versions.py [lane ...]
"""

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree


PROJECT = Path(__file__).resolve().parents[1]
LANES = ("lowest", "pinned", "newest")  # and "today"
FOLDERS_IN_WHEEL = ("hf_moe_cpt", "hub_cards", "modeling", "scripts", "trainers")
SHOWN = ("transformers", "torch", "trl", "peft", "datasets", "accelerate", "tokenizers", "huggingface_hub", "pyarrow")

# Models, the front door, products of experts in Triton, a checkpoint without the package, one run of each trainer
# (with and without an adapter), and generation from a policy.
SUITE = (
    "tests/modeling",
    "tests/front",
    "tests/kernels/test_grouped_gemm.py",
    "tests/hub/test_remote_code.py",
    "tests/scripts/test_cpt.py::test_a_preset_is_trained_evaluated_and_saved",
    "tests/scripts/test_cpt.py::test_a_checkpoint_is_continued_from_a_yaml_file_that_the_command_line_overrides",
    "tests/scripts/test_rainbowpo.py::test_a_model_is_trained_evaluated_and_saved",
    "tests/scripts/test_rainbowpo.py::test_an_adapter_is_trained",
    "tests/scripts/test_surgery.py::test_a_model_is_operated_on_measured_and_saved",
    "tests/scripts/test_surgery.py::test_an_adapter_is_trained",
    "tests/scripts/test_rejection_sample.py::test_the_data_set_holds_the_pairs_that_the_rule_selects",
)
ABOUT_THE_CHECKOUT = ("tests/front/test_packaging.py",)


def main(lanes: list[str]) -> int:
    """Run the lanes and print a line for each; 1 if a test failed in any of them."""
    if unknown := set(lanes) - {*LANES, "today"}:
        raise SystemExit(f"error: unknown lane {', '.join(sorted(unknown))}: choose from {', '.join(LANES)}, today.")
    home = PROJECT / ".lanes"
    shutil.rmtree(home / "built", ignore_errors=True)
    source, wheel = build(home / "built")
    for folder in FOLDERS_IN_WHEEL:
        shutil.rmtree(source / folder)
    rows = []
    for lane in lanes or LANES:
        python = install(home / lane, wheel, constraints(lane))
        print(f"== lane {lane}: pytest {len(SUITE)} selections", flush=True)
        rows.append((lane, *run_suite(python, source, home / f"{lane}.xml")))
    print("".join(f"\n{'lane':<8}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>8}  versions"))
    for lane, passed, failed, skipped, seconds, versions in rows:
        print(f"{lane:<8}{passed:>7}{failed:>7}{skipped:>8}{seconds:>8}  {versions}")
    return int(any(failed for _, _, failed, *_ in rows))


def build(folder: Path) -> tuple[Path, Path]:
    """A source distribution, unpacked, and the wheel built from it.

    Of the files that git knows or would add, copied first, so that building leaves nothing in the checkout.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (PROJECT / name).is_file():  # not one that was removed a moment ago
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / "copy" / name)
    _run_build_hook("build_sdist", folder / "copy", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    source = next((folder / "source").iterdir())
    _run_build_hook("build_wheel", source, folder)
    return source, next(folder.glob("*.whl"))


def _run_build_hook(name: str, source: Path, folder: Path) -> None:
    """What pip and build call, in the folder of the sources; they start four processes for it."""
    code = f"from setuptools import build_meta; build_meta.{name}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, stdout=subprocess.DEVNULL)


def constraints(lane: str) -> dict[str, str]:
    """The exact versions of a lane, by package; what is not named is the newest that the others allow."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    extras = (lines for extra, lines in setup["options.extras_require"].items() if extra != "test")
    ranges = "\n".join([setup["options"]["install_requires"], *extras])
    lowest = dict(re.findall(r"^([\w-]+)>=([\w.]+)", ranges, re.MULTILINE))
    wanted = {"lowest": lowest, "pinned": pinned, "newest": {}, "today": {}}[lane]
    has_cuda = lane == "today" or shutil.which("nvidia-smi")
    return wanted if has_cuda else {**wanted, "torch": pinned["torch"]}


def install(folder: Path, wheel: Path, exact: dict[str, str]) -> Path:
    """Make or bring up to date the environment of a lane; returns its Python."""
    print(f"== installing the wheel into {folder.relative_to(PROJECT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    file = folder / "constraints.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in exact.items()))
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    eager = ["--upgrade", "--upgrade-strategy", "eager", "--constraint", str(file)]
    subprocess.run([*pip, *eager, f"{wheel}[test]"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)  # its version is always the same
    return python


def run_suite(python: Path, source: Path, report: Path) -> tuple[int, int, int, int, str]:
    """(passed, failed, skipped, seconds, versions) of the suite with a lane's Python; output goes where ours does."""
    words = ["-m", "pytest", "-q", "-m", "not slow and not gpu", f"--junit-xml={report}", "-p", "no:cacheprovider"]
    ignored = [f"--ignore={file}" for file in ABOUT_THE_CHECKOUT]
    report.unlink(missing_ok=True)
    start = time.monotonic()
    code = subprocess.run([str(python), *words, *ignored, *SUITE], cwd=source, check=False).returncode
    seconds = round(time.monotonic() - start)
    if code > 1:
        raise SystemExit(f"error: pytest stopped with exit code {code} in lane {report.stem}.")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    ran = {case.get("name") for case in suite.iter("testcase")}
    if left_out := [node for node in SUITE if "::" in node and node.rpartition("::")[2] not in ran]:
        raise SystemExit(f"error: {', '.join(left_out)} did not run: a mark such as slow keeps it out of the lanes.")
    tests, skipped, *failed = (int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors"))
    site = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    found = {item.name.lower().replace("-", "_"): item.version for item in distributions(path=[str(site)])}
    versions = ", ".join(f"{name} {found[name]}" for name in SHOWN)
    return tests - skipped - sum(failed), sum(failed), skipped, seconds, versions


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
