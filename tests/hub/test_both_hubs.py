"""What holds on the Hub of the tests holds on huggingface.co, with a token in HF_MOE_CPT_HUB_TOKEN that may write.

They make a private repository of a random name there and delete it. Without the variable nothing leaves the machine.
"""

import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.hub_checkpoints import fingerprint
from tests.hub.conftest import COMMAND, Processes, runner
from tests.hub.test_hub_mixin import TRAIN
from tests.hub.test_publishing import LOAD


TOKEN = os.environ.get("HF_MOE_CPT_HUB_TOKEN")
ADDRESS = "https://huggingface.co"
pytestmark = pytest.mark.skipif(not TOKEN, reason="HF_MOE_CPT_HUB_TOKEN holds no token for huggingface.co")
WHO = "from huggingface_hub import HfApi\nprint(HfApi().whoami()['name'])\n"
FORGET = "import sys\nfrom huggingface_hub import HfApi\nHfApi().delete_repo(sys.argv[1], missing_ok=True)\n"
LOOK = """
import json, sys
from huggingface_hub import HfApi
name, *revisions = sys.argv[1:]
found = {"private": HfApi().model_info(name).private, "commits": [], "files": {}}
for commit in reversed(HfApi().list_repo_commits(name, revision=revisions[0] if revisions else None)):
    found["commits"].append(commit.title)
    found["files"][commit.commit_id] = HfApi().list_repo_files(name, revision=commit.commit_id)
print(json.dumps(found))
"""


@dataclass
class Place:
    """A Hub, and the name of a repository there that does not exist yet."""

    run: Callable[..., subprocess.CompletedProcess]
    name: str

    def look(self, *revision: str) -> dict:
        """What the repository holds: its commits, oldest first, and the names of the files of each."""
        return json.loads(self.run(LOOK, self.name, *revision).stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def public_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Those that use huggingface.co."""

    def variables(home: Path, token: str | None) -> dict[str, str]:
        return {"HF_ENDPOINT": ADDRESS, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token or ""}

    started = Processes(variables, tmp_path_factory.mktemp("public"))
    yield started
    started.close()


@pytest.fixture
def place(public_processes: Processes, tmp_path: Path) -> Iterator[Place]:
    """A name there; what was made is deleted."""
    run = runner(public_processes, tmp_path, TOKEN)
    name = f"{run(WHO).stdout.strip()}/hf-moe-cpt-test-{secrets.token_hex(6)}"
    yield Place(run, name)
    run(FORGET, name)


def test_a_push_loads_without_the_package_and_a_second_one_changes_nothing(folder, place, tmp_path):
    before = fingerprint(folder)
    for _ in range(2):
        place.run(COMMAND, "push", folder, place.name, "--private", package=True)
    assert fingerprint(folder) == before
    found = place.look()
    assert found["private"] is True
    of_the_push = [files for files in found["files"].values() if "config.json" in files]
    assert {"model.safetensors", "tokenizer.json", "README.md", "modeling_cpt_moe.py"} <= set(of_the_push[0])
    assert all(files == of_the_push[0] for files in of_the_push)
    place.run(LOAD, place.name, tmp_path / "out.pt")
    model, tokens = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(24).view(2, 12)
    assert torch.equal(torch.load(tmp_path / "out.pt")["logits"], model(input_ids=tokens).logits)


def test_a_training_pushes_models_that_load_to_a_branch(place, tmp_path):
    settings = {"hub_model_id": place.name, "hub_always_push": True, "hub_private_repo": True, "hub_revision": "trial"}
    done = place.run(TRAIN, tmp_path / "run", json.dumps(settings), "final", package=True)
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    found = place.look("trial")
    assert found["private"] is True and "Training in progress, step 2" in found["commits"]
    models = {oid: files for oid, files in found["files"].items() if "config.json" in files}
    assert len(models) >= 2 and all("modeling_cpt_moe.py" in files for files in models.values())
    place.run(LOAD, place.name, tmp_path / "out.pt", next(iter(models)))
    place.run(LOAD, place.name, tmp_path / "out.pt", "trial")


def test_who_may_not_write_is_told_in_one_line(folder, place):
    for token, name, message in (
        ("hf_unknown", place.name, "does not know this token (401)"),
        (None, place.name, "no token for the Hub: log in"),
    ):
        refused = place.run(COMMAND, "push", folder, name, "--private", token=token, package=True, check=False)
        assert refused.returncode == 2 and message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
