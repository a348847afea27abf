"""Finished runs of each trainer, a Hub on loopback, and processes that use it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from tqdm import tqdm

from hf_moe_cpt.quickstart import QuickstartArguments, QuickstartFolder, Scale, make_plan, prepare_data, run_stage
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.loopback_hub import WRITER, LoopbackHub
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import two_domains, word_tokenizer
from tests.helpers.warm_process import WarmProcess


LIBRARIES = ("torch", "transformers.pipelines", "transformers.generation", "transformers.trainer", "peft")
OF_THE_PACKAGE = ("hf_moe_cpt.cli", "hf_moe_cpt.scripts.push", "tests.helpers.cpt_runs", "tests.helpers.surgery_runs")
NOT_INSTALLED = ("hf_moe_cpt", "triton")
# Token, name, and how the refusal to write there begins; someone/rows is a data set.
NOT_ALLOWED = [
    (None, "someone/tiny", "no token for the Hub: log in"),
    ("hf_unknown", "someone/tiny", "the Hub does not know this token (401)"),
    ("hf_reader", "someone/tiny", "the token may not write to 'someone/tiny' (403"),
    ("hf_writer", "others/tiny", "the token may not write to 'others/tiny' (403"),
    ("hf_writer", "some one/tiny", "'some one/tiny' cannot be a repository"),
    ("hf_writer", "someone/rows", "'someone/rows' is the name of a dataset on the Hub"),
]


@pytest.fixture(scope="session")
def running_hub() -> Iterator[LoopbackHub]:
    """The one server of this process, since the warm processes know one address."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def hub(running_hub: LoopbackHub) -> LoopbackHub:
    """A Hub that nobody has used."""
    running_hub.reset()
    return running_hub


class Processes:
    """Warm processes, with and without the package, that use one Hub, each with an empty cache.

    of_hub: variables of a process that uses the Hub, from the folder of its caches and a token.
    """

    def __init__(self, of_hub: Callable[[Path, str | None], dict[str, str]], folder: Path) -> None:
        self.of_hub, self.folder = of_hub, folder
        self.server: WarmProcess | None = None

    def run(
        self, script: Path, arguments: list[str], token: str | None, package: bool, **how: int
    ) -> subprocess.CompletedProcess:
        """As `WarmProcess.run`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.server is None:
            self.server = WarmProcess(self._environment(None, False), LIBRARIES, NOT_INSTALLED, OF_THE_PACKAGE)
        return self.server.run(script, arguments, self._environment(token, package), hidden=not package, **how)

    def _environment(self, token: str | None, package: bool) -> dict[str, str]:
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT) if package else ""}
        return {**os.environ, **self.of_hub(self.folder, token), **settings}

    def close(self) -> None:
        """End them."""
        if self.server is not None:
            self.server.close()


@pytest.fixture(scope="session")
def processes(running_hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Those that use the Hub on loopback."""
    started = Processes(running_hub.environment, tmp_path_factory.mktemp("homes"))
    yield started
    started.close()


@pytest.fixture
def elsewhere(hub: LoopbackHub, processes: Processes, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script in a process with an empty cache that reaches this Hub, by default one without the package."""
    return runner(processes, tmp_path, WRITER)


def runner(processes: Processes, folder: Path, writer: str) -> Callable[..., subprocess.CompletedProcess]:
    """Run scripts, kept in `folder`, with the token `writer` unless told otherwise; a failure is the test's."""

    def run(
        script: str,
        *arguments: object,
        token: str | None = writer,
        package: bool = False,
        check: bool = True,
        **how: int,
    ) -> subprocess.CompletedProcess:
        file = folder / f"script_{len(list(folder.glob('script_*.py')))}.py"
        file.write_text(script)
        done = processes.run(file, [*map(str, arguments)], token, package, **how)
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    return run


COMMAND = "import sys\nfrom hf_moe_cpt.cli import main\nsys.exit(main(sys.argv[1:]))\n"


@pytest.fixture
def command(elsewhere) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command line of ours, such as "push", against this Hub."""

    def run(*arguments: str, token: str | None = WRITER, check: bool = True) -> subprocess.CompletedProcess:
        return elsewhere(COMMAND, *arguments, token=token, package=True, check=check)

    return run


@pytest.fixture(scope="session")
def finished() -> dict[str, Path]:
    """Folders of a tiny run of each method: trained, evaluated and saved as the scripts do. Copy before changing."""
    root = Path(os.environ["HF_MOE_CPT_TEST_CACHE"]) / "finished"
    with FileLock(f"{root}.lock"):  # one of the processes of a session makes them
        if not (root / "done").exists():
            _finish(root)
            (root / "done").touch()
    return {"cpt": root / "cpt", "rainbowpo": root / "preference" / "run", "surgery": root / "surgery"}


def _finish(root: Path) -> None:
    measured = {"eval_on_start": True, "eval_strategy": "steps"}
    model = preference_runs.saved_model(root, "cpt_moe")
    for run in (
        cpt_runs.trainer(root / "cpt", evaluated=True, eval_steps=3, **measured),
        preference_runs.trainer(root / "preference", model, eval_dataset=preference_runs.pairs(8, 1)),
        surgery_runs.trainer(root / "surgery", "cpt_moe", eval_steps=2, **measured),
    ):
        run.train()
        run.save_model()
        run.save_metrics("eval", run.evaluate())
        run.save_state()
        word_tokenizer().save_pretrained(run.args.output_dir)


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first model of a quickstart on two small folders of text, four steps."""
    root = tmp_path_factory.mktemp("quickstart")
    two_domains(root / "text")
    scale = Scale(steps=4, batch_size=4, max_length=32, learning_rate=3e-3, vocab_size=300, held_out_tokens=200)
    asked = QuickstartArguments(device="cpu", data_dir=str(root / "text"))
    plan = replace(make_plan(asked), scale=scale)
    target, stage = QuickstartFolder(root / "output", plan), plan.stages[0]
    target.claim()
    with tqdm(total=stage.steps, disable=True) as bar:
        run_stage(stage, plan, prepare_data(plan, target), target, bar)
    return target.model(stage.name)


@pytest.fixture
def folder(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A finished continual pre-training that a test may damage."""
    return Path(shutil.copytree(finished["cpt"], tmp_path / "tiny-cpt"))


def log_of(folder: Path) -> list[dict]:
    """The training log that a run saved."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
