"""Runs of a sweep are kept, resumed, tried again and dealt to processes; intervals are scipy's, pages their files'."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tqdm.auto import tqdm

from hf_moe_cpt.scripts.replication import preference_methods, surgery_methods
from hf_moe_cpt.scripts.replication.sweep import Crew, open_folder, page_of, seeds_needed, t_interval, t_quantile
from tests.helpers.source_tree import PROJECT


@dataclass(frozen=True)
class SquareRun:
    """A number to square; 13 cannot be."""

    number: int
    method: str = "square"

    @property
    def name(self) -> str:
        return f"square-{self.number}"


class Squares:
    """Writes down, in a file, what it was asked for; stops the sweep at a number as somebody who interrupts it."""

    def __init__(self, log: Path, interrupted_at: int | None = None) -> None:
        self.log, self.interrupted_at = log, interrupted_at

    def carry_out(self, run: SquareRun) -> dict[str, int]:
        if run.number == self.interrupted_at:
            raise KeyboardInterrupt
        with self.log.open("a") as file:
            file.write(f"{run.number}\n")
        if run.number == 13:
            raise FloatingPointError("the square of 13\nis not a number")
        return {"square": run.number**2}


def sweep(folder: Path, numbers: list[int], workers: int = 1, interrupted_at: int | None = None) -> dict[str, dict]:
    """The records of the numbers, from a folder and a worker."""
    bar = tqdm(total=len(numbers), disable=True)
    given = folder.with_suffix(".log"), interrupted_at
    with Crew(open_folder(str(folder), {"power": 2}), workers, Squares, *given) as crew:
        return crew.records([SquareRun(number) for number in numbers], bar)


def asked(folder: Path) -> list[int]:
    return [int(line) for line in folder.with_suffix(".log").read_text().split()]


def test_what_is_finished_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    error = "FloatingPointError: the square of 13 is not a number"
    for _ in range(2):
        assert sweep(folder, [3, 13]) == {"square-3": {"square": 9}, "square-13": {"error": error}}
    assert asked(folder) == [3, 13, 13]
    assert [path.name for path in (folder / "runs").iterdir()] == ["square-3.json"]
    assert sweep(folder, [3, 4])["square-4"] == {"square": 16} and asked(folder) == [3, 13, 13, 4]


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "out", [1, 2, 3], interrupted_at=3)
    assert sweep(tmp_path / "out", [1, 2, 3]) == {f"square-{n}": {"square": n * n} for n in (1, 2, 3)}
    assert asked(tmp_path / "out") == [1, 2, 3]


def test_no_run_begins_when_time_is_up(tmp_path: Path) -> None:
    folder, runs, bar = tmp_path / "out", [SquareRun(number) for number in (1, 2, 3)], tqdm(disable=True)
    assert sweep(folder, [1]) == {"square-1": {"square": 1}}
    given = folder.with_suffix(".log"), None
    with Crew(open_folder(str(folder), {"power": 2}), 1, Squares, *given, until=0.0) as crew:
        assert crew.records(runs[:1], bar) == {"square-1": {"square": 1}}
        with pytest.raises(TimeoutError, match="no time is left"):
            crew.records(runs, bar)
    assert asked(folder) == [1]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    assert sweep(tmp_path / "two", [1, 2, 3, 4], workers=2) == sweep(tmp_path / "one", [1, 2, 3, 4])


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    open_folder(str(tmp_path / "out"), {"world.seed": 1, "steps": 2})
    with pytest.raises(ValueError, match="was made with steps=2, and now it is 3: name another folder"):
        open_folder(str(tmp_path / "out"), {"world.seed": 1, "steps": 3})
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and this tool did not write it: name another folder"):
        open_folder(str(tmp_path), {})


REFUSED = {
    "setting": (("--setting", "huge"), "--setting 'huge' is unknown: choose from small"),
    "seeds": (("--seeds", "0"), "--seeds 0: every method needs at least one final run"),
    "workers": (("--workers", "0"), "--workers 0: at least one process"),
    "program": (("pages",), "'pages' is unknown: choose from compare, page"),
}
OF_PREFERENCE = {
    "method": (("--methods", "simpo", "ppo"), "--methods 'ppo' is unknown: choose from -LN -mixing -margin -phi"),
    "device": (("--device", "abacus"), "--device 'abacus' is unknown: choose from cpu, cuda"),
}
OF_SURGERY = {
    "method": (("--methods", "safe", "rmu"), "--methods 'rmu' is unknown: choose from paper, descent-kl, safe"),
    "architecture": (("--architectures", "rnn"), "--architectures 'rnn' is unknown: choose from llama, cpt_moe"),
    "first seed": (("--first_seed", "0"), "--first_seed 0: settings were chosen on seed 0; take a later one"),
    "device": (("--device", "abacus"), "--device 'abacus' is unknown: choose one of auto, cpu, cuda"),
}
CASES = [(preference_methods, *case) for case in (REFUSED | OF_PREFERENCE).values()]
CASES += [(surgery_methods, *case) for case in (REFUSED | OF_SURGERY).values()]


@pytest.mark.parametrize("program, words, message", CASES, ids=lambda value: value[0] if type(value) is tuple else "")
def test_bad_arguments_are_refused_with_one_line_before_anything_is_written(program, words, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        program.main([*words, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_t_quantiles_are_scipys() -> None:
    for degrees, probability in itertools.product([1, 2, 3, 4, 7, 10, 29, 60], [0.5, 0.8, 0.975, 0.999]):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)
    values = [0.3, 0.9, 0.4, 0.45]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert t_interval([2.0]) == (2.0, None)
    with pytest.raises(ValueError, match="an interval needs at least one value"):
        t_interval([])


PROGRAMS = {"preference_world": preference_methods, "preference_world_h200": preference_methods}
PROGRAMS |= dict.fromkeys(
    ("surgery_small", "surgery_small_whole", "surgery_small_40", "surgery_smollm2"), surgery_methods
)


@pytest.mark.parametrize("folder", PROGRAMS)
def test_committed_pages_are_those_of_their_files(folder, monkeypatch) -> None:
    monkeypatch.chdir(PROJECT)
    program, path = PROGRAMS[folder], Path("docs/benchmarks") / folder
    page = page_of(path, program.PROGRAM, program.GUIDE, program.comparison_text)
    assert (path / "README.md").read_text(encoding="utf-8") == page
    assert json.loads((path / "results.json").read_text())["rows"]


@pytest.mark.parametrize("seed", range(4))
def test_as_many_seeds_as_are_said_decide(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.3, 1.0, size=5)
    needed = seeds_needed(values.std(ddof=1), 5, abs(values.mean()))

    def half(count: int) -> float:
        return stats.t(count - 1).ppf(0.975) * values.std(ddof=1) / np.sqrt(count)

    assert needed is None or (
        half(needed) < abs(values.mean()) and (needed == 6 or half(needed - 1) >= abs(values.mean()))
    )
    assert seeds_needed(1.0, 3, 0.0) is None and seeds_needed(1e-9, 3, 1.0) == 4
