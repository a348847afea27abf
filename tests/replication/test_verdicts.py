"""The page of verdicts is what its script makes of the committed results; seeds that would decide do decide."""

import numpy as np
import pytest
from scipy import stats

from hf_moe_cpt.scripts.replication import verdicts
from tests.helpers.source_tree import PROJECT


def test_the_committed_page_is_the_scripts(tmp_path, capsys) -> None:
    verdicts.write(["--output_file", str(tmp_path / "new" / "page.md")])
    assert (tmp_path / "new" / "page.md").read_text() == (PROJECT / "docs/replication/README.md").read_text()
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_as_many_seeds_as_are_said_decide(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.1, 1.0, size=5)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    needed = int(verdicts.seeds_needed((high - low) / 2, 5, abs(values.mean())).replace("more than 1,000", "1000"))
    if needed < 1000:
        error = values.std(ddof=1) / np.sqrt(needed)
        assert stats.t(needed - 1).ppf(0.975) * error < abs(values.mean())
        error = values.std(ddof=1) / np.sqrt(needed - 1)
        assert needed == 6 or stats.t(needed - 2).ppf(0.975) * error >= abs(values.mean())


def test_what_no_number_of_seeds_decides() -> None:
    assert verdicts.seeds_needed(1.0, 3, 0.0) == "more than 1,000"
