"""Any number of ranks, any engine and any accumulation give the numbers of one process with the same global batch."""

import pytest

from tests.distributed.jobs import JOBS
from tests.helpers.rank_runs import TRAINERS


pytestmark = pytest.mark.slow
LOSS = 1e-5  # relative, of every logged loss
OTHERS = 5e-5  # of the largest value that a key takes in the run: differences of near numbers are logged too
COSINE = 1e-3  # absolute, between gradients that are more than rounding: others are not logged
LOSSES = {"loss", "lm_loss", "eval_loss", "eval_new_loss", "update/ce", "unlearn/ce"}
NOT_OF_THE_MODEL = {"total_flos"}  # it counts padding, which depends on the micro-batch

ALL = [(ranks, name) for ranks in (2, 4) for name, job in JOBS[ranks].items() if not {"step", "short"} & job.keys()]


@pytest.fixture(params=[(1, "accumulated"), *ALL], ids=lambda cell: cell[1])
def cell(request, results_of):
    """Runs of one engine on some ranks, and those of one process that they must repeat."""
    num_ranks, name = request.param
    job = JOBS[num_ranks][name] | {"ranks": num_ranks}
    alike = "whole" if job.get("balance", True) else "without balance"
    want = job.get("model") or ("shaken" if job.get("shaken") else alike)
    return job, results_of(num_ranks)[name], results_of(1)[want]


@pytest.mark.parametrize("kind", TRAINERS)
def test_ranks_repeat_every_number_of_one(cell, kind):
    """Penalties, MRI, losses by source, phi, rewards, terms, norms and cosines of their gradients, and evaluations."""
    job, got, want = cell
    if kind not in got:
        pytest.skip("a job of a surgery alone")
    pairs = list(zip(want[kind]["log"], got[kind]["log"], strict=True))
    scale = {}
    for entry in (*want[kind]["log"], *got[kind]["log"]):
        scale |= {k: max(scale.get(k, 0.0), abs(v)) for k, v in entry.items() if isinstance(v, int | float)}
    compared = set()
    for entry, other in pairs:
        assert entry.keys() == other.keys()
        for key in entry.keys() - NOT_OF_THE_MODEL - _unsettled(entry, job):
            tolerance = COSINE if "cosine" in key else OTHERS * scale.get(key, 0.0)
            tolerance = LOSS * abs(entry[key]) if key in LOSSES else tolerance
            assert other[key] == pytest.approx(entry[key], abs=tolerance), (key, entry.get("step"))
            compared.add(key)
    penalties = {"aux_loss", "z_loss"} if "model" in job else {"aux_loss"} if job.get("accumulation") else set()
    penalties |= {"retain/router_kl", "grad_norm/update"} if job.get("shaken") else set()
    assert compared >= (NAMES[kind] - penalties) | ({"bias_range"} if "model" in job else set())
    for key in {"weights", "dispersion_scale"} & want[kind].keys():
        assert got[kind][key] == pytest.approx(want[kind][key], rel=1e-6)


def test_the_engine_is_the_one_that_was_asked_for(cell):
    job, got, _ = cell
    if job["ranks"] == 1:
        assert {found["engine"] for found in got.values()} == {"CptMoeForCausalLM"}
        return
    is_sharded = any(name in job for name in ("fsdp", "accelerate", "sharded"))
    engines = {found["engine"] for found in got.values()}
    assert engines == {"FSDPCptMoeForCausalLM" if is_sharded else "DistributedDataParallel"}


def test_gradients_are_sharded_between_micro_batches(cell):
    job, got, _ = cell
    if "accumulation" in job and any(name in job for name in ("fsdp", "accelerate", "sharded")):
        kept = [got[name]["gradients_between"] for name in ("cpt", "rainbowpo")]  # a surgery takes its terms' away
        assert kept == [["DTensor"], ["DTensor"]]


def test_a_sharded_surgery_in_bfloat16_has_not_moved_before_its_first_step(results_of):
    """Its anchors hold to what the sharded model computes: weights that are gathered in bfloat16, not its own."""
    log = results_of(2)["FSDP2 in bfloat16"]["surgery"]["log"]
    assert [entry["eval_retain_kl"] for entry in log if "eval_retain_kl" in entry][0] == 0.0
    assert [entry["retain/kl"] for entry in log if "retain/kl" in entry][0] < 5e-5  # padded in another way


NAMES = {
    "cpt": {"loss", "lm_loss/new", "lm_loss/replay", "aux_loss", "z_loss", "mri", "eval_new_loss", "forgetting"},
    "rainbowpo": {"loss", "aux_loss", "phi/mean", "phi/min", "ref_entropy", "rewards/margins", "num_tokens"},
    "surgery": {"unlearn/loss", "update/ce", "retain/kl", "retain/router_kl", "grad_norm/update", "eval_retain_kl"},
}


def _unsettled(entry, job):
    """Keys without a number, and the balance of a micro-batch, which is not that of the batch."""
    keys = {key for key, value in entry.items() if not isinstance(value, int | float)}
    return keys | ({"aux_loss", "loss/aux"} if job.get("accumulation") else set())
