"""Charts are well-formed SVG whose paths, ticks and marks sit where the numbers say."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.schedule_plot import plot_schedule
from hf_moe_cpt.optim import DEFAULT_PHASES, schedule_curve


LABELS = {"title": "Does it fall?", "x_label": "step", "y_label": "loss (nats/token)"}
SVG = "{http://www.w3.org/2000/svg}"


def parsed(*series, **options):
    return ElementTree.fromstring(line_chart(series, **{**LABELS, **options}))


def of_class(root, tag, name):
    return [element for element in root.iter(SVG + tag) if name in element.get("class", "").split()]


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path.get("d"))]


def test_points_lie_on_the_axes_ticks():
    root = parsed(Series("a", [0, 50, 100], [0.0, 10.0, 5.0]), from_zero=True)
    (path,) = of_class(root, "path", "curve")
    ticks = {text.text: (float(text.get("x")), float(text.get("y")) - 4) for text in of_class(root, "text", "tick")}
    columns, rows = [x for x, _ in points_of(path)], [y for _, y in points_of(path)]
    axis = [text for text in of_class(root, "text", "tick") if "middle" in text.get("class")]
    x_of = {text.text: float(text.get("x")) for text in axis}
    assert columns == pytest.approx([x_of["0"], (x_of["0"] + x_of["100"]) / 2, x_of["100"]], abs=0.11)
    assert rows[1] == pytest.approx(ticks["10"][1], abs=0.11)


def test_log_axis_spaces_decades_evenly_and_drops_what_it_cannot_show():
    root = parsed(Series("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, -5.0]), log_y=True)
    (path,) = of_class(root, "path", "curve")
    (_, first), (_, second), (_, third) = points_of(path)
    assert first - second == pytest.approx(second - third, abs=0.11) and first > third
    assert json.loads(path.get("data-points"))["y"] == [1, 10, 100, None]


def test_nan_lifts_the_pen():
    root = parsed(Series("a", range(5), [1.0, 2.0, math.nan, 2.0, 3.0]))
    (path,) = of_class(root, "path", "curve")
    assert path.get("d").count("M") == 2 and "nan" not in path.get("d")


def test_marks_are_drawn_labelled_and_in_range():
    root = parsed(
        Series("a", [0, 100], [0.5, 0.4]),
        vertical=[Mark(60, "distribution shift"), Mark(61, "close by"), Mark(99, "end")],
        horizontal=[Mark(0.1, "ideal")],
    )
    lines = of_class(root, "line", "mark")
    notes = {text.text: text for text in of_class(root, "text", "note")}
    assert len(lines) == 4 and set(notes) == {"distribution shift", "close by", "end", "ideal"}
    assert float(notes["close by"].get("y")) > float(notes["distribution shift"].get("y"))
    bottom = float(root.get("data-area").split()[3])
    assert float(lines[3].get("y1")) < bottom  # a reference below every curve still lies inside the plot


def test_text_is_escaped():
    name = 'K < 3 & "x"'
    root = parsed(Series(name, [0, 1], [0, 1]), Series("b", [0, 1], [1, 0]), title="<script>alert(1)</script>")
    assert of_class(root, "text", "title")[0].text == "<script>alert(1)</script>"
    assert json.loads(of_class(root, "path", "curve")[0].get("data-points"))["name"] == name


def test_legend_has_one_key_per_series_and_wraps():
    many = [Series(f"a rather long name of series {i}", [0, 1], [i, i]) for i in range(7)]
    root = parsed(*many)
    assert len(of_class(root, "g", "key")) == 7
    rows = {key.find(f"{SVG}text").get("y") for key in of_class(root, "g", "key")}
    assert len(rows) > 1
    colours = {re.search(r"c\d", path.get("class"))[0] for path in of_class(root, "path", "curve")}
    assert len(colours) == 7
    assert not of_class(parsed(many[0]), "g", "key")


def test_long_curves_are_thinned():
    svg = line_chart([Series("a", range(100_000), [math.sin(i / 999) for i in range(100_000)])], **LABELS)
    assert len(svg) < 60_000


@pytest.mark.parametrize("y", [[], [math.nan], [3.0], [0.0, 0.0]])
def test_degenerate_data_still_draws(y):
    for log_y in (False, True):
        assert "nan" not in line_chart([Series("a", range(len(y)), y)], **LABELS, log_y=log_y).lower().replace(
            "nats", ""
        )


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="series 'a' has 2 x and 3 y values"):
        parsed(Series("a", [0, 1], [1, 2, 3]))


def test_plot_schedule_writes_a_standalone_picture(tmp_path):
    rates = {"max_lr": 3e-4, "constant_lr": 1.65e-4, "min_lr": 3e-5}
    curve = schedule_curve(schedule="cosine_inf", num_steps=1_000, phases=DEFAULT_PHASES["scratch"], **rates)
    path = plot_schedule(tmp_path / "new" / "lr.svg", **vars(curve))
    root = ElementTree.parse(path).getroot()
    assert root.find(f"{SVG}style") is not None
    assert [text.text for text in of_class(root, "text", "note")] == ["warmup", "cooldown", "constant", "anneal"]
