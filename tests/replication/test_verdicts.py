"""The page of verdicts is what its script makes of the committed results."""

import pytest

from hf_moe_cpt.scripts.replication import verdicts
from tests.helpers.source_tree import PROJECT


def test_the_committed_page_is_the_scripts(tmp_path, capsys) -> None:
    verdicts.write(["--output_file", str(tmp_path / "new" / "page.md")])
    assert (tmp_path / "new" / "page.md").read_text() == (PROJECT / "docs/replication/README.md").read_text()
    assert "wrote" in capsys.readouterr().out


def test_ranks_give_the_claims_about_the_batch_paired_by_seed() -> None:
    rows = [
        {"scope": scope, "seed": seed, "old_before": 6.0 + worse, "old_after": 7.0, "new_after": 5.0}
        | {"mri_before": [0.2] * 30, "mri_after": [0.2 + worse] * 30}
        for seed, worse in enumerate((0.03, 0.02, 0.04))
        for scope, worse in (("global", 0.0), ("rank", worse))
    ]
    alone = {**rows[0], "seed": 9}  # its twin was cut off
    found = verdicts.ranks_results([*rows, alone])
    loss, spike, forgets = found["claims"]
    assert found["seeds"] == [0, 1, 2] and loss["mean"] == pytest.approx(-0.03) and loss["verdict"] == "confirmed"
    assert spike["mean"] == pytest.approx(-0.15) and forgets["mean"] == pytest.approx(0.03)


def test_the_open_verdicts_say_what_would_decide_them() -> None:
    cells = ("; 9 seeds |", "; 11 runs |", "; 50 seeds (of 3) |", "; more than 1,000 seeds |", " 5 seeds, 3 runs |")
    told = verdicts.open_told("".join(f"**undecided** +1{cell}\n" for cell in cells))
    assert "1 would be decided by at most 10 seeds or runs and 2 by 11 to 50; for 1 it" in told
