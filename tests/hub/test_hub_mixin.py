"""`push_to_hub=True`: every push carries the code, a failing Hub stops no training, the token stays out of files."""

import json
from pathlib import Path

import pytest

from tests.helpers.loopback_hub import WRITER


TRAIN = """
import json, logging, sys
from pathlib import Path
from tests.helpers import cpt_runs
from tests.helpers.tiny_models import word_tokenizer
logging.basicConfig(level=logging.WARNING)
folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
run = cpt_runs.trainer(
    folder, evaluated=True, eval_on_start=True, max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True,
    **changes,
)
run.processing_class = word_tokenizer()
run.train()
run.save_model()
print(json.dumps({"failed": run.failed_pushes, "losses": cpt_runs.logged(run.state.log_history, "loss")}))
if "final" in sys.argv:
    run.push_to_hub(dataset_name="me/texts", license="mit")
"""
TRAIN_OTHERS = """
import sys
from pathlib import Path
from tests.helpers import surgery_runs
from tests.helpers.tiny_models import word_tokenizer
folder = Path(sys.argv[2])
pushed = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True, "hub_always_push": True}
pushed |= {"hub_model_id": "someone/live"}
if sys.argv[1] == "rainbowpo":
    from tests.helpers import preference_runs
    run = preference_runs.trainer(folder, preference_runs.saved_model(folder, "cpt_moe"), **pushed)
else:
    run = surgery_runs.trainer(folder, "cpt_moe", processing_class=word_tokenizer(), **pushed)
run.train()
run.push_to_hub()
assert run.failed_pushes == []
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM
for revision in sys.argv[2:]:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=revision, trust_remote_code=True)
"""


def _train(elsewhere, folder: Path, *more: str, token: str | None = WRITER, **changes):
    settings = {"hub_model_id": "someone/live", "hub_always_push": True, **changes}
    return elsewhere(TRAIN, folder, json.dumps(settings), *more, token=token, package=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["every_save", "checkpoint", "all_checkpoints", "end"],
)
def test_every_push_of_every_strategy_carries_the_code(hub, elsewhere, tmp_path, strategy):
    _train(elsewhere, tmp_path / "run", "final", hub_strategy=strategy)
    commits = hub.commits("someone/live")
    models = [commit for commit in commits if "config.json" in commit.files]
    assert len(models) >= (1 if strategy == "end" else 2)
    for commit in models:
        named = json.loads(commit.files["config.json"])["auto_map"].values()
        assert {f"{place.partition('.')[0]}.py" for place in named} <= set(commit.files), commit.message
    last = commits[-1].files
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert {path.partition("/")[0] for path in last if "checkpoint" in path} == folders.get(strategy, set())
    card = last["README.md"].decode()
    assert "me/texts" in card and "license: mit" in card and "forgetting, nats per token" in card
    if strategy == "every_save":
        elsewhere(LOAD, "someone/live", *(commit.oid for commit in models))


@pytest.mark.slow  # one mixin, which the tests below drive through a continual pre-training
@pytest.mark.parametrize("method", ["rainbowpo", "surgery"])
def test_the_other_trainers_push_whole_models_too(hub, elsewhere, tmp_path, method):
    elsewhere(TRAIN_OTHERS, method, tmp_path / "run", package=True)
    commits = [commit for commit in hub.commits("someone/live") if "config.json" in commit.files]
    assert len(commits) >= 2
    assert all({"modeling_cpt_moe.py", "configuration_cpt_moe.py"} <= set(commit.files) for commit in commits)
    run = json.loads(commits[-1].files["training_run.json"])
    assert run["method"] == method and run["versions"]["transformers"]
    card = commits[-1].files["README.md"].decode()
    assert "## How to load" in card and str(tmp_path) not in card and str(tmp_path) not in json.dumps(run)
    elsewhere(LOAD, "someone/live", commits[0].oid, commits[-1].oid)


def test_a_hub_that_fails_stops_no_training_and_is_reported(hub, elsewhere, tmp_path):
    alone = _train(elsewhere, tmp_path / "alone", hub_model_id="someone/other")
    hub.fail("POST .*/live/commit/", status=403, times=1)
    hub.fail("PUT /lfs/", status=400, times=1)
    done = _train(elsewhere, tmp_path / "run", "final")
    told, expected = (json.loads(run.stdout.splitlines()[-1]) for run in (done, alone))
    assert told["losses"] == expected["losses"] and expected["failed"] == []
    assert len(told["failed"]) >= 1
    assert "training goes on. `hf-moe-cpt push" in done.stderr
    assert "modeling_cpt_moe.py" in hub.files("someone/live")  # the push at the end brought all


def test_a_private_branch_without_the_token_in_any_file_or_output(hub, elsewhere, tmp_path):
    place = {"hub_private_repo": True, "hub_revision": "trial"}
    done = _train(elsewhere, tmp_path / "run", "final", token=None, hub_token=WRITER, **place)
    assert WRITER in hub.tokens_seen
    repository = hub.store.find("model", "someone/live")
    assert repository.private and set(repository.at("main").files) == {".gitattributes"}
    wanted = {"model.safetensors", "modeling_cpt_moe.py", "README.md", "training_run.json"}
    assert wanted <= set(repository.at("trial").files)
    elsewhere(LOAD, "someone/live", "trial")
    published = [content for commit in repository.commits.values() for content in commit.files.values()]
    local = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for content in [*published, *local, done.stdout.encode(), done.stderr.encode()]:
        assert WRITER.encode() not in content
