"""The benchmark of a node deals GPUs once, and a run that it stops and kills on other ranks is the undisturbed one."""

import pytest

from hf_moe_cpt.scripts.benchmarks import node
from hf_moe_cpt.scripts.benchmarks.report import rows_of
from tests.distributed.jobs import HAS_EP


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_stage_fits_the_machine(gpus, tmp_path):
    stages = node.stages_of(node.NodeArguments(gpus=gpus, device="cpu", output_dir=str(tmp_path)))
    assert all(0 < sum(job.ranks for job in stage) <= gpus for stage in stages)
    names = [job.name for stage in stages for job in stage]
    assert len(names) == len(set(names))  # folders
    assert {f"pb {2**power}" for power in range(gpus.bit_length())} <= set(names)
    assert {f"layers {gpus}", f"30b {gpus}", "30b 2"} <= set(names)


@pytest.mark.parametrize("gpus", [1, 3, 6])
def test_numbers_that_cannot_be_halved_are_refused(gpus):
    with pytest.raises(ValueError, match=f"--gpus {gpus} must be a power of two"):
        node.NodeArguments(gpus=gpus)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EP, reason="needs transformers 5.23 and torch 2.13")
def test_a_run_that_is_killed_on_other_ranks_is_the_undisturbed_one(tmp_path, capfd):
    node.main(["--gpus", "2", "--device", "cpu", "--tiny", "--parts", "resume", "--output_dir", str(tmp_path)])
    rows = rows_of(tmp_path / "resume.csv")
    assert len(rows) == node.STEPS
    for row in rows:
        assert float(row["disturbed"]) == pytest.approx(float(row["undisturbed"]), rel=1e-5)
    assert "SIGKILL of a rank of 2 in a save" in capfd.readouterr().out
