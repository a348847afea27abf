"""`hf-moe-cpt plan`: its choices, its two outputs, what it refuses."""

import json
import re
from dataclasses import replace

import pytest

from hf_moe_cpt.planning.memory import TrainingSetup
from hf_moe_cpt.planning.plan import GIBIBYTE, RESERVED, start_command
from hf_moe_cpt.scripts import plan
from tests.helpers.source_tree import PROJECT


GUIDE = (PROJECT / "docs/scaling.md").read_text(encoding="utf-8")
TINY = ["--preset", "pb-granular-tiny", "--seq_length", "64"]


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """A model is measured once for all answers about it: it does not depend on what else is asked."""
    known: dict = {}

    def remembering(measure):
        def recall(config, *asked):
            key = (measure.__name__, json.dumps(config.to_dict(), default=str), *asked)
            if key not in known:
                known[key] = measure(config, *asked)
            return known[key]

        return recall

    with pytest.MonkeyPatch.context() as patch:
        for name in ("measure_kept", "measure_size"):
            patch.setattr(plan, name, remembering(getattr(plan, name)))
        yield


def answer(capsys: pytest.CaptureFixture, *options: str) -> dict:
    plan.main([*TINY, "--json", *options])
    return json.loads(capsys.readouterr().out)


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    shown = re.findall(r"```text\n\$ hf-moe-cpt plan (.*?)\n(.*?)```", GUIDE, re.DOTALL)
    assert shown
    for command, output in shown:
        plan.main(command.split())
        assert capsys.readouterr().out == output, f"run `hf-moe-cpt plan {command}` and paste what it prints"


def test_the_simplest_engine_that_fits_is_taken(capsys: pytest.CaptureFixture) -> None:
    one = answer(capsys)
    assert (one["setup"]["engine"], list(one["memory_bytes"])) == ("single", ["single"])
    two_nodes = answer(capsys, "--gpus", "16")
    assert two_nodes["setup"]["engine"] == "ddp"
    assert list(two_nodes["memory_bytes"]) == ["ddp", "hsdp", "fsdp2", "zero3", "ep"]
    totals = {name: memory["total"] for name, memory in two_nodes["memory_bytes"].items()}
    small = (totals["ddp"] + totals["hsdp"]) / 2 / GIBIBYTE / (1 - RESERVED)
    assert answer(capsys, "--gpus", "16", "--gpu-memory", str(small))["setup"]["engine"] == "hsdp"
    assert answer(capsys, "--gpus", "16", "--engine", "zero3")["setup"]["engine"] == "zero3"
    assert "ep" not in answer(capsys, "--gpus", "64", "--gpus_per_node", "64")["memory_bytes"]  # 31 experts


def test_the_start_names_processes_and_machines() -> None:
    setup = TrainingSetup(engine="hsdp", gpus=16, trainer="surgery")
    hsdp = "accelerate launch --config_file scripts/accelerate/hsdp_2x8.yaml --num_processes 16 --num_machines 2"
    assert start_command(setup) == f"{hsdp} scripts/surgery.py"
    assert start_command(replace(setup, engine="ddp")) == "torchrun --nnodes 2 --nproc_per_node 8 scripts/surgery.py"
    assert "--num" not in start_command(TrainingSetup())


def test_kernels_are_those_of_the_trainers_for_any_model(capsys: pytest.CaptureFixture) -> None:
    for more, kernels in (([], "fused"), (["--kernels", "plain"], "plain")):
        plan.main(["--preset", "llama-tiny", "--seq-length", "64", "--json", *more])
        assert json.loads(capsys.readouterr().out)["setup"]["kernels"] == kernels


def test_remedies_make_it_fit(capsys: pytest.CaptureFixture) -> None:
    """Each remedy, given as options, turns the answer; the largest batch fits and one more does not."""
    options = ["--batch_size", "256", "--gpu_memory", "0.3"]
    too_much = answer(capsys, *options)
    assert not too_much["fits"]
    assert [remedy.split()[0] for remedy in too_much["remedies"]][:2] == ["--batch_size", "--gradient_checkpointing"]
    for remedy in too_much["remedies"]:
        assert answer(capsys, *options, *remedy.split())["fits"], remedy
    largest = too_much["largest_batch"]
    assert answer(capsys, *options, "--batch_size", str(largest))["fits"]
    assert not answer(capsys, *options, "--batch_size", str(largest + 1))["fits"]


def test_days_and_cost_follow_from_the_step(capsys: pytest.CaptureFixture) -> None:
    options = "--gpus 4 --tokens 1e6 --price-per-gpu-hour 3 --gradient-accumulation-steps 2"
    got = answer(capsys, *options.split())
    assert got["tokens_per_step"] == 4 * 8 * 64 * 2
    steps = -(-1_000_000 // got["tokens_per_step"])
    assert got["days"] == pytest.approx([steps * seconds / 86_400 for seconds in got["step_seconds"]])
    assert got["cost"] == pytest.approx([days * 24 * 4 * 3 for days in got["days"]])
    assert got["speed_from"]["commit"]
    assert got["estimate"].startswith("An estimate, no measurement")


DENSE = ["--preset", "dense-tiny"]
REFUSED = [
    ([], r"^--preset and --model: neither given; give one, such as --preset pb-granular-2b\.$"),
    ([*TINY, "--gpu", "a100"], r"^--gpu 'a100' is unknown: choose from h200, h100\.$"),
    ([*TINY, "--tokens", "-1"], r"^--tokens -1\.0 must be a number above 0\.$"),
    ([*TINY, "--gpus", "2", "--engine", "single"], r"^--engine single is one GPU, got --gpus 2: "),
    ([*TINY, "--trainer", "cpt", "--reference", "copy"], r"^--reference 'copy' with --trainer cpt: choose from none"),
    ([*TINY, "--optimizer", "lamb"], r"^optimizer='lamb' is unknown: choose from adamw, "),
    (DENSE, r"^--seq_length 2048 is longer than the 256 positions of the model: "),
    (
        [*DENSE, "--seq_length", "8", "--gpus", "2", "--engine", "ep"],
        r"^--engine ep cannot .* from ddp, fsdp2, zero3\.$",
    ),
    (
        [*TINY, "--gpus", "2", "--trainer", "surgery", "--engine", "zero3"],
        r"^--engine zero3 cannot run surgery of pb-granular-tiny on .*: choose from ddp, fsdp2, ep\.$",
    ),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_makes_no_sense_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.main(options)
