"""What a surgery evaluation shows: a table that fits a terminal, files that tell the same, a page on its own."""

import csv
import html
import json
import re
from pathlib import Path

import pytest

from hf_moe_cpt.evaluation.surgery import METRICS, summarise
from hf_moe_cpt.evaluation.surgery_report import TABLE, TERMINAL_WIDTH, cell, number, text_report, write_files
from tests.helpers.source_tree import PROJECT


FACTS = {"settings": {"sets": None, "kinds": ["mcq"], "seed": 3}, "machine": {"device": "CPU", "commit": "abc1234"}}


@pytest.fixture(scope="module")
def summary(raws) -> dict:
    return summarise(**raws, resamples=50)


@pytest.fixture(scope="module")
def written(raws, summary, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_files(root, summary, raws, FACTS)
    return root


def test_numbers_have_three_digits_that_count():
    assert [number(value) for value in (0.1234, 0, -0.5, 1.234, -12.34, 456.78, 12345.6)] == [
        "0.123", "0.000", "-0.500", "1.23", "-12.3", "456.8", "1.23e+04"
    ]  # fmt: skip
    assert cell({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert cell({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert cell(None) == cell({"value": None, "low": None, "high": None}) == "–"


def test_the_table_fits_however_wide_and_holds_the_numbers(summary):
    text = text_report(summary)
    lines = text.split("\n")
    assert max(map(len, lines)) <= TERMINAL_WIDTH and text.startswith(f"verdict: {summary['verdict'][:60]}")
    of_line = {}
    for row in summary["measures"]:
        of_line.setdefault((METRICS[row["metric"]].label, row["set"]), {})[row["side"]] = cell(row)
    for _, entries in TABLE:
        for metric, sets in entries:
            for name in sets:
                label = METRICS[metric].label
                if (label, name) not in of_line:
                    continue
                (line,) = [line for line in lines if re.match(rf"{re.escape(label)}\s+{name}(\s|$)", line)]
                places = [line.find(of_line[label, name].get(side, "–")) for side in summary["sides"]]
                assert -1 not in places
    for heading, _ in TABLE:
        assert heading in lines
    assert "score of before, after, retrained: harmonic mean of (forgetting: 1 - |accuracy on unlearn - target" in text
    wide = {"value": -0.8123, "low": -0.9123, "high": -0.7123}
    far = [row | (wide if row["value"] is not None else {}) for row in summary["measures"]]
    lines = text_report({**summary, "measures": far, "warnings": ["word " * 60]}).split("\n")
    assert max(map(len, lines)) <= TERMINAL_WIDTH
    assert sum(line.startswith(("! word", "  word")) for line in lines) == 3


def test_nothing_at_all_is_still_a_table(tmp_path):
    summary = summarise(after={})
    assert "nothing was measured" in text_report(summary)
    write_files(tmp_path, summary, {"after": {}}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.json", "report.html"}


def test_csv_and_json_tell_the_same(written, summary):
    with (written / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["side", "set", "metric", "value", "low", "high", "n"]
    assert len(rows) == len(summary["measures"]) + len(summary["curves"])
    for row, want in zip(rows, summary["measures"], strict=False):
        assert (row["side"], row["set"], row["metric"]) == (want["side"], want["set"], want["metric"])
        for name in ("value", "low", "high", "n"):
            assert (row[name] == "") == (want[name] is None)
            assert row[name] == "" or float(row[name]) == pytest.approx(want[name], rel=1e-5)
    assert rows[-1]["metric"] == "relearn_benign_others_step_20"
    results = json.loads((written / "results.json").read_text())
    assert results["measures"] == summary["measures"] and results["machine"]["commit"] == "abc1234"
    assert results["metrics"]["kl"]["formula"] == METRICS["kl"].formula and results["metrics"]["kl"]["source"]


def _read(path: Path) -> tuple[list[str], str]:
    """Labels of the charts, and all text."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href)=", page)
    return [html.unescape(label) for label in re.findall(r'<svg[^>]*aria-label="([^"]*)"', page)], html.unescape(
        re.sub(r"<[^>]*>", "\n", page)
    )


def test_the_page_stands_alone_and_shows_everything(written, summary, raws):
    charts, text = _read(written / "report.html")
    assert len(charts) == 14 and "Which set's questions are answered?" in charts
    for metric in {row["metric"] for row in summary["measures"]}:
        assert METRICS[metric].label.removeprefix("- ") in text and METRICS[metric].formula in text
    for row in summary["measures"]:
        assert cell(row) in text
    true_text = raws["before"]["continuations"]["unlearn"]["true_text"][0]
    assert f"true: {true_text}" in text and "abc1234" in text


def test_warnings_are_on_the_page_and_charts_without_numbers_are_not(raws, tmp_path):
    after = {"texts": {name: dict(columns) for name, columns in raws["after"]["texts"].items()}}
    after["texts"]["unlearn"]["logp"] = [[p - 9 for p in logp] for logp in after["texts"]["unlearn"]["logp"]]
    summary = summarise(after=after, resamples=50)
    write_files(tmp_path, summary, {"after": after}, FACTS)
    charts, text = _read(tmp_path / "report.html")
    assert charts == [
        "How well is each set predicted?",
        "How much of the forgotten texts is left, word by word?",
        "Can one tell that the forgotten texts were read?",
    ]
    assert "▲ after is over-forgotten: the loss on unlearn" in text


def test_the_docs_explain_every_metric_as_the_files_do():
    page = (PROJECT / "docs" / "surgery_eval.md").read_text(encoding="utf-8")
    lines = page.split("\n")
    for name, metric in METRICS.items():
        rows = [line for line in lines if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
        assert len(rows) == 1, name
        if metric.source.count("arXiv"):
            number_of = re.findall(r"\d{4}\.\d{5}", metric.source)[-1]
            assert number_of in rows[0], name
