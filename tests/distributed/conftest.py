"""What the trainers do on one, two and four ranks: each number of ranks is one start of torchrun, for all tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.distributed.jobs import JOBS, WIDE
from tests.helpers.fresh_process import launch
from tests.helpers.rank_runs import save_model


@pytest.fixture(scope="session")
def rank_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the model lies that all ranks start from, and their results: one folder for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "ranks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "model.lock"):
        if not (folder / "model").exists():
            save_model(folder)
            save_model(folder, "biased", router_type="bias_topk")
            save_model(folder, "wide", **WIDE)
    return folder


@pytest.fixture(scope="session")
def results_of(rank_folder: Path) -> Callable[[int], dict[str, dict]]:
    """The results of the jobs of 1, 2 or 4 ranks, started when they are first asked for; a failure is kept too."""

    def results(num_ranks: int, all_jobs: dict[int, dict] = JOBS, label: str = "") -> dict[str, dict]:
        name = f"{label}{num_ranks}"
        done, failed = rank_folder / f"{name}.json", rank_folder / f"{name}.failed"
        with FileLock(rank_folder / f"{name}.lock"):
            if failed.exists():
                pytest.fail(failed.read_text())
            if not done.exists():
                failed.write_text(f"the runs on {num_ranks} rank(s) failed before")
                asked = {"folder": str(rank_folder), "results": done.name, "jobs": all_jobs[num_ranks]}
                torchrun = ("torch.distributed.run", "--nproc_per_node", str(num_ranks), "--standalone", "-m")
                words = *(() if num_ranks == 1 else torchrun), "tests.helpers.rank_runs", json.dumps(asked)
                launch(*words, gpus=num_ranks * any(job.get("on_gpu") for job in asked["jobs"].values()))
                failed.unlink()
        return json.loads(done.read_text())

    return results
