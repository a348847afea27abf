"""Finished runs of each trainer, a Hub on loopback, and processes that use it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.loopback_hub import WRITER, LoopbackHub
from tests.helpers.source_tree import PROJECT


WITHOUT_THE_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_moe_cpt", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub that nobody has used."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def elsewhere(hub: LoopbackHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script in a process with an empty cache that reaches this Hub, by default one without the package."""

    def run(script: str, *arguments: str, token: str | None = WRITER, package: bool = False, check: bool = True):
        number = len(list(tmp_path.glob("script_*.py")))
        file = tmp_path / f"script_{number}.py"
        file.write_text(script if package else WITHOUT_THE_PACKAGE + script)
        variables = hub.environment(tmp_path / f"home_{number}", token)
        path = str(PROJECT) if package else ""
        done = subprocess.run(
            [sys.executable, str(file), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def command(elsewhere) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command line of ours, such as "push", against this Hub."""
    script = "import sys\nfrom hf_moe_cpt.cli import Command, COMMANDS, main\n"
    for name in ("card", "push"):
        script += f"COMMANDS.setdefault({name!r}, Command('hf_moe_cpt.scripts.{name}', ''))\n"
    script += "sys.exit(main(sys.argv[1:]))\n"

    def run(*arguments: str, token: str | None = WRITER, check: bool = True) -> subprocess.CompletedProcess:
        return elsewhere(script, *arguments, token=token, package=True, check=check)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny run of each method: trained, evaluated and saved as the scripts do. Copy before changing."""
    root = tmp_path_factory.mktemp("finished")
    runs = {
        "cpt": cpt_runs.trainer(root / "cpt", evaluated=True, eval_on_start=True, eval_strategy="steps", eval_steps=3),
        "rainbowpo": preference_runs.trainer(
            root / "preference", preference_runs.saved_model(root, "cpt_moe"), eval_dataset=preference_runs.pairs(8, 1)
        ),
        "surgery": surgery_runs.trainer(
            root / "surgery", "cpt_moe", eval_strategy="steps", eval_steps=2, eval_on_start=True
        ),
    }
    folders = {}
    for name, run in runs.items():
        run.train()
        run.save_model()
        metrics = run.evaluate()
        run.save_metrics("eval", metrics)
        run.save_state()
        folder = folders[name] = Path(run.args.output_dir)
        preference_runs.word_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def folder(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A finished continual pre-training that a test may damage."""
    return Path(shutil.copytree(finished["cpt"], tmp_path / "tiny-cpt"))


def log_of(folder: Path) -> list[dict]:
    """The training log that a run saved."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
