"""What goes wrong while publishing: a Hub that keeps failing, a process that is killed, a disk that is full."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.faulty_hardware import small_disk
from tests.helpers.hub_checkpoints import fingerprint
from tests.helpers.loopback_hub import WRITER
from tests.hub.conftest import NOT_ALLOWED


PUBLISH_AGAIN_AND_AGAIN = """
import json, sys
from hf_moe_cpt.hub import publishing
from hf_moe_cpt.hub.cards import build_card
publishing.WAITS = (0, 0, 0)  # as many attempts, without the patience
upload = publishing.plan_upload(sys.argv[1], build_card(sys.argv[1]))
said = {}
for name in sys.argv[2:]:
    try:
        publishing.publish(upload, name)
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""
REFUSALS = {
    "someone/busy": (429, "ConnectionError", "the Hub asks for patience (429: injected 429): wait, then run"),
    "someone/late": (409, "ValueError", "'someone/late' is in conflict with what the Hub holds (409: injected 409)"),
    "someone/down": (503, "ConnectionError", "the Hub failed (503: injected 503): nothing was published; run"),
    "someone/away": (None, "ConnectionError", "the connection to the Hub broke while publishing to 'someone/away' ("),
}


def test_a_hub_that_keeps_failing_is_told_in_one_line_and_holds_nothing(folder, hub, elsewhere):
    for name, (status, _, _) in REFUSALS.items():
        hub.fail(f"POST .*{name}/commit/", status=status, drop=status is None, times=9)
    before = fingerprint(folder)
    done = elsewhere(PUBLISH_AGAIN_AND_AGAIN, folder, *REFUSALS, package=True)
    said = json.loads(done.stdout)
    for name, (_, kind, message) in REFUSALS.items():
        assert said[name][0] == kind and said[name][1].startswith(message) and "\n" not in said[name][1]
        assert sum(f"{name}/commit/" in request for request in hub.log) == 4
        assert set(hub.files(name)) == {".gitattributes"}
    assert fingerprint(folder) == before


def test_a_hub_that_says_nothing_is_given_up(folder, hub, elsewhere):
    """After half a second, so that another request that is late on a busy machine is not taken for one, twice."""
    silent = {"drop": True, "times": 99, "meanwhile": lambda: time.sleep(2)}
    hub.fail("POST .*/commit/", **silent)
    script = PUBLISH_AGAIN_AND_AGAIN.replace(
        "publishing.WAITS = (0, 0, 0)", "publishing.SILENCE, publishing.WAITS = 0.5, (0,)"
    )
    done = elsewhere(script, folder, "someone/silent", package=True)
    kind, message = json.loads(done.stdout)["someone/silent"]
    assert kind == "ConnectionError" and message.startswith("the connection to the Hub broke while publishing to ")
    assert "ReadTimeout" in message and "trying again in 0 s" in done.stderr


PUSH_AND_SAY_WHO = """
import os, sys
from pathlib import Path
from hf_moe_cpt.cli import main
Path(sys.argv[1]).write_text(str(os.getpid()))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_nothing_and_goes_on(folder, hub, elsewhere, command, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards, before = len(list(folder.glob("model-*.safetensors"))), fingerprint(folder)

    def kill_when_a_file_has_arrived() -> None:
        deadline = time.monotonic() + 120
        while not hub.store.large_files and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)

    hub.fail("PUT /lfs/", drop=True, meanwhile=kill_when_a_file_has_arrived)
    words = (tmp_path / "process", "push", folder, "someone/tiny")
    killed = elsewhere(PUSH_AND_SAY_WHO, *words, package=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert set(hub.files("someone/tiny")) == {".gitattributes"}
    arrived = len(hub.store.large_files)
    assert shards > arrived > 0
    sent = len([request for request in hub.log if request.startswith("PUT /lfs/")])

    command("push", folder, "someone/tiny")
    sent_again = len([request for request in hub.log if request.startswith("PUT /lfs/")]) - sent
    assert sent_again == shards - arrived
    published = hub.files("someone/tiny")
    assert all(published[path.name] == path.read_bytes() for path in folder.glob("model-*.safetensors"))
    assert len(hub.commits("someone/tiny")) == 1 and fingerprint(folder) == before


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(b"0" * 4096):
            pass


def test_a_push_needs_no_room_and_a_card_that_does_not_fit_leaves_the_old_one(finished, hub, command, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 2_000_000):
        folder = shutil.copytree(finished["cpt"], disk / "tiny", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
        command("card", folder)
        _fill(disk)
        before = fingerprint(folder)
        refused = command("card", folder, "--title", "Another", check=False)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
        assert "cannot be written (No space left on device): make room" in refused.stderr
        assert fingerprint(folder) == before
        command("push", folder, "someone/tiny")
        assert fingerprint(folder) == before
        assert hub.files("someone/tiny")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


TRAIN_ON_A_FULL_DISK = """
import json, logging, os, sys
from pathlib import Path
from transformers import TrainerCallback
from tests.helpers import cpt_runs
from tests.helpers.tiny_models import word_tokenizer

logging.basicConfig(level=logging.WARNING)
disk = Path(sys.argv[1])
filler, weights, left = disk / "filler", disk / "run" / "model.safetensors", {}

def fill(spare):
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass
    except OSError:
        os.truncate(filler, filler.stat().st_size - spare)

class Disk(TrainerCallback):
    def on_push_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            fill(spare=32768)
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            left["weights after the failed copy"] = weights.exists()
            filler.unlink()

run = cpt_runs.trainer(
    disk / "run", max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="someone/live",
    hub_always_push=True,
)
run.processing_class = word_tokenizer()
run.add_callback(Disk())
run.train()
left["losses"] = cpt_runs.logged(run.state.log_history, "loss")
left["failed"], before = run.failed_pushes, weights.read_bytes()
run.model.get_input_embeddings().weight.data.zero_()
fill(spare=8192)
try:
    run.push_to_hub()
except OSError as error:
    left["said"] = str(error)
left["same weights"] = weights.read_bytes() == before
filler.unlink()
run.push_to_hub()
print(json.dumps(left))
"""


def test_a_disk_that_is_full_while_pushing_stops_no_training(hub, elsewhere, tmp_path):
    with small_disk(tmp_path / "disk", 3_000_000):
        done = elsewhere(TRAIN_ON_A_FULL_DISK, tmp_path / "disk", package=True)
        weights = (tmp_path / "disk" / "run" / "model.safetensors").read_bytes()
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["losses"]) == 4
    assert len(told["failed"]) == 1 and "No space left on device" in told["failed"][0]
    assert told["weights after the failed copy"] is False  # what was cut short is gone
    assert told["said"].startswith("the model was not saved to ") and "\n" not in told["said"]
    assert "No space left on device" in told["said"] and "GB free): it is whole in " in told["said"]
    assert told["same weights"] is True
    assert "1 pushes to someone/live failed during training" in done.stderr
    models = [commit for commit in hub.commits("someone/live") if "config.json" in commit.files]
    assert [commit.message for commit in models] == ["Training in progress, step 4", "End of training"]
    assert all({"model.safetensors", "modeling_cpt_moe.py"} <= set(commit.files) for commit in models)
    assert models[-1].files["model.safetensors"] == weights


FROM_TWO_RANKS = """
import os, sys
from pathlib import Path
if os.environ["RANK"] == "1":
    os.environ["HF_TOKEN"] = "hf_of_rank_1"
from tests.helpers import cpt_runs
run = cpt_runs.trainer(
    Path(sys.argv[1]), max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_always_push=True,
    hub_model_id="someone/live",
)
run.train()
run.push_to_hub()
assert run.args.world_size == 2 and run.failed_pushes == []
"""


@pytest.mark.slow
def test_of_two_ranks_one_uploads(hub, elsewhere, tmp_path):
    elsewhere(FROM_TWO_RANKS, tmp_path / "run", package=True, ranks=2)
    assert WRITER in hub.tokens_seen and "hf_of_rank_1" not in hub.tokens_seen
    steps = [commit.message for commit in hub.commits("someone/live")]
    assert steps == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    sent = [request for request in hub.log if request.startswith("PUT /lfs/")]
    assert len(sent) == len(set(sent)) and sum("repos/create" in request for request in hub.log) == 1


TRAINERS_THAT_MAY_NOT = """
import json, sys
from pathlib import Path
from tests.helpers import cpt_runs
said = []
for number, (token, name) in enumerate(json.loads(sys.argv[2])):
    try:
        cpt_runs.trainer(Path(sys.argv[1]) / str(number), push_to_hub=True, hub_model_id=name, hub_token=token)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_a_trainer_that_may_not_push_says_so_before_it_trains(hub, elsewhere, tmp_path):
    hub.store.create("dataset", "someone/rows", private=False)
    asked = json.dumps([case[:2] for case in NOT_ALLOWED])
    said = json.loads(elsewhere(TRAINERS_THAT_MAY_NOT, tmp_path, asked, token=None, package=True).stdout)
    for text, (_, _, message) in zip(said, NOT_ALLOWED, strict=True):
        assert text.startswith(message) and "\n" not in text


LAST_PUSHES = """
import json, sys
from pathlib import Path
from hf_moe_cpt.hub import publishing
from tests.helpers import cpt_runs
publishing.WAITS = (0, 0, 0)
said = {}
for name in ("passes", "stays", "refuses"):
    run = cpt_runs.trainer(
        Path(sys.argv[1]) / name, max_steps=1, push_to_hub=True, hub_model_id=f"someone/{name}", hub_strategy="end"
    )
    run.train()
    try:
        run.push_to_hub(commit_message="the last")
    except (ValueError, ConnectionError) as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_the_push_at_the_end_is_tried_again_and_says_what_to_do(hub, elsewhere, tmp_path):
    hub.fail("POST .*passes/commit/", status=503, times=2)
    hub.fail("POST .*stays/commit/", drop=True, times=9)
    hub.fail("POST .*refuses/commit/", status=403, times=9)
    said = json.loads(elsewhere(LAST_PUSHES, tmp_path, package=True).stdout.splitlines()[-1])
    assert [commit.message for commit in hub.commits("someone/passes")] == ["the last"]
    assert said.keys() == {"stays", "refuses"}
    for name, start in {"stays": "the connection to the Hub broke while", "refuses": "the token may not"}.items():
        assert said[name].startswith(start) and "\n" not in said[name]
        assert f"The trained model is saved, and `hf-moe-cpt push {tmp_path / name} someone/{name}`" in said[name]
        assert (tmp_path / name / "model.safetensors").is_file() and hub.commits(f"someone/{name}") == []
