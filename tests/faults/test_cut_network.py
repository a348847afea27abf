"""Two hosts whose network is cut in mid-run: both ends notice, and the run goes on when the cable is back."""

import json
from pathlib import Path

import pytest

from hf_moe_cpt.scripts.soak_checkpoints import PATIENCE, Rank
from hf_moe_cpt.trainers.instruments.checkpoints import checkpoints_in
from tests.helpers.two_hosts import two_hosts


pytestmark = pytest.mark.slow


STEPS = 300  # some ten seconds: the cable is cut in the middle also on a busy machine


def _start(ranks: list[Rank], folder: Path, attempt: int) -> None:
    for rank in ranks:
        rank.start(
            {"folder": str(folder), "attempt": attempt, "max_steps": STEPS, "save_steps": 5, "hang_timeout": 8.0}
        )


def test_a_cut_network_ends_both_ranks_and_costs_the_steps_since_the_last_checkpoint(tmp_path):
    with two_hosts() as hosts:
        settings = {"GLOO_SOCKET_IFNAME": hosts.interface}
        ranks = [Rank(rank, 2, port=29501, on=hosts.command(rank), settings=settings) for rank in (0, 1)]
        try:
            _start(ranks, tmp_path, attempt=0)
            assert ranks[0].wait_for("saved", PATIENCE)["saved"] == 5
            hosts.plug(False)
            for rank in ranks:  # gloo alone would wait for half an hour
                rank.wait_for("exit", PATIENCE)
                assert rank.exit_code == 1
            logs = [(tmp_path / f"log-00000-{rank}").read_text() for rank in (0, 1)]
            assert any("(hang_timeout)" in log for log in logs)
            last = checkpoints_in(tmp_path / "run")[-1]

            hosts.plug(True)
            _start(ranks, tmp_path, attempt=1)
            assert ranks[0].wait_for("began", PATIENCE)["began"] == int(last.name.rpartition("-")[2])
            for rank in ranks:
                rank.wait_for("exit", PATIENCE)
                assert rank.exit_code == 0
        finally:
            for rank in ranks:
                rank.close()
    history = json.loads((tmp_path / "result.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
