"""A run that goes on with another engine on another number of ranks, optimizer and all, is the run of one process."""

from pathlib import Path

import pytest
import torch.distributed as dist

from hf_moe_cpt.trainers.common.checkpointing import SHARDS, last_whole_checkpoint
from tests.distributed.jobs import HAS_EP, OURS
from tests.helpers import cpt_runs, rank_runs
from tests.helpers.forked_ranks import on_ranks


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_EP, reason="needs transformers 5.23 and torch 2.13")]
STEPS = 6
PLAIN, FSDP2, HSDP = {}, {"fsdp": True}, {"sharded": {"dp_replicate_size": 2, "fsdp_size": 2}}
EP = {ranks: {"sharded": {"fsdp_size": ranks, "ep_size": ranks, **OURS}} for ranks in (2, 4)}
EP_AND_FSDP2 = {"sharded": {"fsdp_size": 4, "ep_size": 2, **OURS}}
WAYS = {
    "experts on 2, one process, experts on 4": ((2, EP[2]), (1, PLAIN), (4, EP[4])),
    "FSDP2 on 2, HSDP, experts on 2": ((2, FSDP2), (4, HSDP), (2, EP[2])),
    "experts cut twice, FSDP2, one process": ((4, EP_AND_FSDP2), (2, FSDP2), (1, PLAIN)),
}


def leg(folder: Path, out: Path, job: dict, last: int) -> list[dict]:
    """Train to step `last` and save; go on where a checkpoint lies."""
    rows = rank_runs.ROWS // dist.get_world_size()
    shared = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "adam_epsilon": 1e-3}
    if "fsdp" in job:
        shared |= {"accelerator_config": {"use_configured_state": True}, **rank_runs.FSDP2}
    with rank_runs.clean_accelerate(job):
        model = rank_runs.open_model(folder / "model", job.get("sharded"))
        trainer = cpt_runs.trainer(out, model, per_device_train_batch_size=rows, **shared)
        trainer.add_callback(cpt_runs.stop_at(last))
        trainer.train(resume_from_checkpoint="auto")
    return cpt_runs.without_clocks(trainer.state.log_history)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_any_engine_goes_on(way, tmp_path):
    rank_runs.save_model(tmp_path)
    want = on_ranks(1, tmp_path / "one", leg, tmp_path, tmp_path / "undisturbed", PLAIN, STEPS)[0]
    for number, (ranks, job) in enumerate(way):
        last = 2 * number + 2
        got = on_ranks(ranks, tmp_path / f"leg {number}", leg, tmp_path, tmp_path / "run", job, last)[0]
        checkpoint = last_whole_checkpoint(tmp_path / "run")
        assert checkpoint.name == f"checkpoint-{last}"
        assert (checkpoint / SHARDS).is_dir() == (job != PLAIN)
    losses, others = cpt_runs.logged(want, "lm_loss"), cpt_runs.logged(got, "lm_loss")
    assert len(losses) == STEPS
    assert others == pytest.approx(losses, rel=1e-5)
