"""The routing report holds the numbers of its analysis: in the page as a browser shows it, in JSON, CSV and SVG."""

import csv
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from hf_moe_cpt.routing import report as routing_report
from hf_moe_cpt.routing.report import MAX_STEPS, page_data, rounded, routing_page, write_routing_report
from tests.helpers.browser import ask_page, needs_browser
from tests.helpers.routing_analyses import CHECKPOINTS, DOMAINS, random_analysis
from tests.reports.test_tables import Page


CURVES = "return [...document.querySelectorAll('#{} path[data-points]')].map(path => JSON.parse(path.dataset.points));"
CELLS = "return [...document.querySelectorAll('#{} tbody tr')].map(r => [...r.cells].map(c => c.textContent));"
LEGEND = "[...document.querySelectorAll('#balance .legend span')].map(s => s.textContent)"
HOVER = """
const canvas = document.querySelectorAll("#{target} canvas")[{place}], box = canvas.getBoundingClientRect();
const at = {{clientX: box.left + box.width * {x}, clientY: box.top + box.height * {y}, bubbles: true}};
canvas.dispatchEvent(new MouseEvent("mousemove", at));
return document.getElementById("tip").textContent;
"""


SWITCHES = """
document.querySelectorAll("#checkpoints button")[0].click();
const slider = document.getElementById("set-layer"); slider.value = 1; slider.dispatchEvent(new Event("input"));
const find = document.getElementById("set-token"); find.value = "no such token";
find.dispatchEvent(new Event("input"));
const names = LEGEND;
return {names, address: location.hash, tokens: document.getElementById("tokens").textContent};
""".replace("LEGEND", LEGEND)
LAYER, ROW, COLUMN = 2, 1, 4
QUESTIONS = {
    "mri, german": ("measure=mri&domain=german", CURVES.format("balance")),
    "entropy": ("measure=load_entropy", CURVES.format("balance")),
    "saturation": ("domain=english", CURVES.format("saturation")),
    "summary": ("domain=english", CELLS.format("summary")),
    "training": ("step=2", CURVES.format("training")),
    "marks": ("", "return [...document.querySelectorAll('#training .note')].map(t => t.textContent);"),
    "domains": (f"layer={LAYER}", HOVER.format(target="domains", place=1, x=(COLUMN + 0.5) / 6, y=(ROW + 0.5) / 2)),
    "coactivation": (f"layer={LAYER}", HOVER.format(target="coactivation", place=3, x=4.5 / 6, y=1.5 / 6)),
    "tokens": ("layer=0", CELLS.format("tokens")),
    "switches": ("", SWITCHES),
    "after the switches": ("", f"return {LEGEND};"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    analysis = random_analysis()
    return analysis, write_routing_report(analysis, tmp_path_factory.mktemp("report"), "Is <it> robust?")


def numbers(values: Any) -> Any:
    return pytest.approx(np.asarray(values, dtype=float).tolist(), rel=1e-4)


def test_page_json_and_charts_stand_alone(written):
    page = written[1].read_text(encoding="utf-8")
    parsed = Page(page)
    assert parsed.open == [] and parsed.addresses == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org)", page)
    assert "<h1>Is &lt;it&gt; robust?</h1>" in page
    analysis, path = written
    stored = json.loads((path.parent / "analysis.json").read_text(encoding="utf-8"))
    assert stored == rounded(analysis, digits=None)
    assert not (path.parent / "coactivation.npz").exists()
    names = {path.stem for path in written[1].parent.glob("*.svg")}
    assert names == set(routing_report.CHARTS)
    chart = (written[1].parent / "mri_by_step.svg").read_text(encoding="utf-8")
    assert "the data changes" in chart and "run has recovered" in chart and "perfect balance" in chart


def test_page_embeds_the_analysis(written):
    analysis, path = written
    embedded = r'<script type="application/json" id="routing-data">(.*?)</script>'
    data = json.loads(re.search(embedded, path.read_text(encoding="utf-8"), re.S)[1])
    for part in analysis.keys() - {"top_tokens", "coactivation"}:
        assert data[part] == rounded(analysis[part]), part
    for name in CHECKPOINTS:
        assert np.array(data["coactivation"][name]) == pytest.approx(analysis["coactivation"][name], rel=6e-3)
        listed = analysis["top_tokens"][name][2][5]
        assert [data["tokens"][at] for at, _, _ in data["top_tokens"][name][2][5]] == [t["token"] for t in listed]
    assert data["notes"] == []


@pytest.fixture(scope="module")
def seen(written) -> dict[str, Any]:
    """Answers of one visit to the page."""
    return ask_page(written[1], QUESTIONS)


@needs_browser
def test_browser_draws_the_curves_of_the_chosen_text_and_measure(written, seen):
    analysis = written[0]
    for question, measure, domain in (("mri, german", "mri", "german"), ("entropy", "load_entropy", "all")):
        curves = seen[question]
        assert [curve["name"] for curve in curves] == list(CHECKPOINTS)
        for curve in curves:
            assert curve["y"] == numbers(analysis["metrics"][curve["name"]][domain][measure])
    assert [curve["y"] for curve in seen["saturation"]] == [
        numbers(analysis["saturation"][name]["english"]) for name in CHECKPOINTS[1:]
    ]


@needs_browser
def test_browser_shows_the_summary_and_training(written, seen):
    analysis, rows = written[0], seen["summary"]
    for name, cells in zip(CHECKPOINTS, rows, strict=True):
        measures = analysis["metrics"][name]["english"]
        assert cells[0] == name and cells[1] == "5,000"
        assert float(cells[2]) == pytest.approx(measures["mri_normalized"].mean(), rel=1e-3)
        assert int(cells[3]) == measures["mri_normalized"].argmax()
        slowdown = analysis["expert_parallel"][name]["contiguous"]["slowdown"]
        assert float(cells[8]) == pytest.approx(slowdown.mean(), rel=1e-3)
    assert rows[0][5] == "itself" and rows[1][5].endswith(" %")
    assert seen["training"][0]["y"] == numbers(analysis["training"][0]["layers"][2])
    assert seen["marks"] == ["perfect balance", "the data changes", "run has recovered after 5 steps"]


@needs_browser
def test_heat_maps_tell_their_numbers_under_the_mouse(written, seen):
    analysis, text = written[0], seen["domains"]
    share = analysis["domain_specialization"][CHECKPOINTS[1]][LAYER][ROW][COLUMN]
    assert f"layer {LAYER}" in text and f"tokens of {DOMAINS[ROW]} visit expert {COLUMN}" in text
    told = re.search(r"([\d.]+) %", text.partition(f"expert {COLUMN}")[2])[1]
    assert float(told) == pytest.approx(100 * share, rel=1e-2)
    first, second = (analysis["coactivation"][name][LAYER][ROW][COLUMN] for name in CHECKPOINTS[:2])
    assert f"P({COLUMN} | {ROW})" in seen["coactivation"]
    told = re.search(r"change(-?[\d.e-]+)$", seen["coactivation"])[1]
    assert float(told) == pytest.approx(second - first, abs=1e-3)


@needs_browser
def test_switches_act_and_are_kept_in_the_address(seen):
    found = seen["switches"]
    assert found["names"] == list(CHECKPOINTS[1:])
    assert "off=0" in found["address"] and "layer=1" in found["address"]
    assert found["tokens"] == "No expert of this layer lists it."
    assert seen["after the switches"] == list(CHECKPOINTS)  # an address without words means the first view


@needs_browser
def test_tokens_are_text_not_markup(written, seen):
    rows = seen["tokens"]
    entry = written[0]["top_tokens"][CHECKPOINTS[0]][0][3][0]
    visible = entry["token"].replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    assert rows[3][0] == "3" and rows[3][1].startswith(f"{visible} ")
    assert float(rows[3][1].removeprefix(visible).split("%")[0]) == pytest.approx(100 * entry["share"], rel=1e-2)


@needs_browser
@pytest.mark.parametrize("theirs", ["one checkpoint, K = 1", "bare"])
def test_parts_that_are_not_there_are_explained(tmp_path, theirs):
    analysis = random_analysis(experts_per_token=1, checkpoints=("only",))
    if theirs == "bare":
        parts = "domain_specialization expert_parallel vocabulary_specialization top_tokens saturation"
        analysis |= dict.fromkeys(parts.split())
        for measures in analysis["metrics"]["only"].values():
            measures |= {"router_entropy": None, "router_confidence": None}
        analysis["training"] = []
    path = write_routing_report(analysis, tmp_path)
    script = "return Object.fromEntries([...document.querySelectorAll('.drawing')].map(d => [d.id, d.textContent]));"
    texts = ask_page(path, {"texts": ("measure=router_entropy", script)})["texts"]
    assert texts["coactivation"] == "every token visits one expert"
    assert "one checkpoint only" in texts["saturation"]
    if theirs == "bare":
        assert texts["training"] == "No training log was given (--log_history)."
        assert "No probabilities of the routers" in texts["balance"]
        assert texts["domains"] == texts["vocabulary"] == "It was not computed."
    assert "coactivation: every token visits one expert" in path.read_text(encoding="utf-8")


def test_csv_files_hold_the_same_numbers(written):
    analysis, path = written
    tables = {name: _read_csv(path.parent / f"{name}.csv") for name in ("layers", "experts", "tokens", "training")}
    place = (CHECKPOINTS[2], "german", "1")
    row = next(r for r in tables["layers"] if (r["checkpoint"], r["text"], r["layer"]) == place)
    assert float(row["mri"]) == analysis["metrics"][CHECKPOINTS[2]]["german"]["mri"][1]
    assert float(row["saturation"]) == analysis["saturation"][CHECKPOINTS[2]]["german"][1]
    assert row["vocabulary_input"] == "" and row["name"] == "layers.1.experts"
    assert len(tables["layers"]) == 3 * 3 * 3 and len(tables["experts"]) == 3 * 3 * 3 * 6
    assert len(tables["tokens"]) == 3 * 3 * 6 * 4
    assert tables["tokens"][1]["token"] == analysis["top_tokens"][CHECKPOINTS[0]][0][0][1]["token"]
    assert [float(r["mri"]) for r in tables["training"]] == analysis["training"][0]["mean"]


NASTY = ("<!--<script>", "__proto__", "constructor", "</script><script>alert(1)</script>", "=1+2", "@x")


def _nasty_analysis() -> dict[str, Any]:
    """Checkpoints, domains and tokens of names that end a script, are of every object, or are formulas."""
    analysis = random_analysis(checkpoints=NASTY)
    renamed = dict(zip(analysis["domains"], NASTY, strict=False))
    analysis["domains"] = [renamed[name] for name in analysis["domains"]]
    for part in ("metrics", "saturation"):
        for name, texts in analysis[part].items():
            analysis[part][name] = {renamed.get(text, text): values for text, values in texts.items()}
    for layer in analysis["top_tokens"][NASTY[0]]:
        for place, entry in enumerate(layer[0][: len(NASTY)]):
            entry["token"] = NASTY[place]
    return analysis


def test_no_name_ends_the_page_and_no_cell_is_a_formula(tmp_path):
    path = write_routing_report(_nasty_analysis(), tmp_path)
    page = path.read_text(encoding="utf-8")
    embedded = re.search(r'id="routing-data">([^<]*)</script>', page)[1]  # to the first "<" there is
    assert json.loads(embedded) == page_data(_nasty_analysis()) and Page(page).open == []
    for name in ("layers", "experts", "tokens"):
        cells = [cell for row in _read_csv(tmp_path / f"{name}.csv") for cell in row.values()]
        assert "'=1+2" in cells and not [c for c in cells if re.match(r"[=@\t\r]|[+-](?![\d.])", c)]


@needs_browser
def test_a_browser_draws_names_that_every_object_has(tmp_path):
    path = write_routing_report(_nasty_analysis(), tmp_path)
    script = "return [...document.querySelectorAll('#summary tbody tr, #summary tr')].map(r => r.textContent);"
    shown = ask_page(path, {name: (f"domain={quote(name)}", script) for name in ("all", *NASTY[:2])})
    for rows in shown.values():
        assert all(any(name in row for row in rows) for name in NASTY)


def test_large_parts_are_thinned_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_report, "MAX_MATRIX_NUMBERS", 2 * 3 * 20**2)
    monkeypatch.setattr(routing_report, "MAX_TOKENS", 2 * 3 * 40 * 3)
    monkeypatch.setattr(routing_report, "MAX_JSON_NUMBERS", 1000)
    analysis = random_analysis(3, 40, 8, checkpoints=("a", "b"), steps=3000)
    data = page_data(analysis)
    block = np.array(data["coactivation"]["b"][2])
    experts = data["coactivation_experts"][2]
    assert block == pytest.approx(analysis["coactivation"]["b"][2][np.ix_(experts, experts)], rel=6e-3)
    ties = np.max([m[2] * ~np.eye(40, dtype=bool) for m in analysis["coactivation"].values()], axis=0)
    assert len(experts) == 20 and int(ties.max(1).argmax()) in experts  # the strongest pair is among them
    run = data["training"][0]
    assert len(run["steps"]) <= MAX_STEPS and max(run["mean"]) == float(f"{max(analysis['training'][0]['mean']):.5g}")
    assert {len(tokens) for layer in data["top_tokens"]["a"] for tokens in layer} == {3}
    page = write_routing_report(analysis, tmp_path).read_text(encoding="utf-8")
    assert len(data["notes"]) == 3 and all(note in page for note in data["notes"])
    with np.load(tmp_path / "coactivation.npz") as stored:
        assert np.array_equal(stored["b"], analysis["coactivation"]["b"])
    assert json.loads((tmp_path / "analysis.json").read_text())["coactivation"] == "coactivation.npz"


@needs_browser
def test_runs_of_other_depths_are_drawn_where_they_have_the_layer(tmp_path):
    analysis = random_analysis()
    run = analysis["training"][0]
    analysis["training"] = [run | {"name": "shallow", "layers": run["layers"][:1]}, run]
    path = write_routing_report(analysis, tmp_path)
    script = CURVES.format("training").replace("dataset.points)", "dataset.points).name")
    names = ask_page(path, {"first": ("step=0", script), "last": ("step=2", script)})
    assert names == {"first": ["shallow", run["name"]], "last": [run["name"]]}


def test_what_an_earlier_analysis_left_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_report, "MAX_JSON_NUMBERS", 10)
    write_routing_report(random_analysis(), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".json", ".npz", ".csv", ".svg"}
    write_routing_report(random_analysis(experts_per_token=1, checkpoints=("only",)) | {"training": []}, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {
        *("mri_by_layer", "vocabulary_input_by_layer", "vocabulary_output_by_layer")
    }
    assert not (tmp_path / "training.csv").exists() and not (tmp_path / "coactivation.npz").exists()


@pytest.mark.slow
def test_sixty_four_layers_of_256_experts_stay_below_ten_megabytes():
    assert len(routing_page(random_analysis(64, 256, 8, steps=5000), "large").encode()) < 10_000_000


def test_what_is_no_analysis_is_refused_and_what_json_does_not_know_is_null(tmp_path):
    with pytest.raises(ValueError, match="it has no domains, layers, metrics: pass the dictionary of"):
        write_routing_report({"checkpoints": ["a"]}, tmp_path)
    values = {"a": [float("nan"), np.float32(0.5), 3], "b": np.array([np.inf, 1 / 3])}
    assert rounded(values) == {"a": [None, 0.5, 3], "b": [None, 0.33333]}


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
