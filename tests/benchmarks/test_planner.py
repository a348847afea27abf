"""What the planner takes from the committed benchmarks: its estimates against every peak, its file of speeds."""

import pytest

from hf_moe_cpt.planning.memory import measure_kept
from hf_moe_cpt.planning.plan import SPEED_OF_GPU, config_of
from hf_moe_cpt.scripts.benchmarks import planner
from tests.helpers.source_tree import PROJECT


BENCHMARKS = PROJECT / "docs/benchmarks"
GUIDE = (PROJECT / "docs/scaling.md").read_text(encoding="utf-8")
STATED_ERROR = 0.03


@pytest.mark.slow
def test_every_compared_peak_is_met_within_the_stated_error() -> None:
    peaks = list(planner.measured_peaks(BENCHMARKS))
    errors = {(peak.source, peak.run): planner.estimated_gib(peak) / peak.gib - 1 for peak in peaks}
    assert len(errors) == len(peaks) >= 18
    assert ("h200/step.csv", "pb-granular-2b:fused:hf_moe_cpt") in errors
    assert {key: error for key, error in errors.items() if abs(error) > STATED_ERROR} == {}
    assert planner.error_table(BENCHMARKS) in GUIDE


def test_two_layers_stand_for_all_where_layers_are_equal() -> None:
    """What the errors are computed with is what the command counts, but for positions and masks."""
    few = planner.kept_by("pb-switch-tiny", 64, "mixed", "fused")
    all_layers = measure_kept(config_of("pb-switch-tiny"), 64, "mixed", "fused")
    assert few.layers == all_layers.layers
    assert few.of_batch(3) == all_layers.of_batch(3)
    assert few.fixed == pytest.approx(all_layers.fixed, rel=1e-3)


@pytest.mark.slow
def test_speeds_are_those_of_the_committed_steps(tmp_path) -> None:
    planner.main(["speeds", "--benchmarks", str(BENCHMARKS), "--output", str(tmp_path / "speeds.csv")])
    committed = PROJECT / "hf_moe_cpt/planning/speeds.csv"
    assert committed.read_text() == (tmp_path / "speeds.csv").read_text(), "run scripts/benchmarks/planner.py speeds"
    assert SPEED_OF_GPU["h100"] == pytest.approx(planner.device_ratio(BENCHMARKS), abs=5e-5)
