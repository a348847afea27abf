"""Charts are well-formed SVG whose paths, ticks, dots and marks sit where the numbers say; ticks are round and few."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt import reports as charts
from hf_moe_cpt.optim import DEFAULT_PHASES, schedule_curve


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_even_and_inside(low, span):
    high = low + span
    ticks = charts.linear_ticks(low, high)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert 1 <= len(ticks) <= 8
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    gaps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps) if gaps else [], rel=1e-3)


def test_tick_values():
    assert charts.linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.linear_ticks(0.03, 0.31) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert charts.log_ticks(0.9, 120) == [1, 2, 5, 10, 20, 50, 100]
    assert charts.log_ticks(1e-6, 1) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert charts.log_ticks(2.0, 5.0) == [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1500, "1500"), (2e4, "20k"), (1.5e6, "1.5M"), (1.65e-4, "1.65e-4"), (-0.25, "-0.25"), (4e11, "400B")],
)
def test_tick_labels(value, text):
    assert charts.format_tick(value) == text


def test_thinning_keeps_ends_spikes_and_wide_gaps():
    y = [0.0] * 10_000
    y[4_321], y[7_000] = 9.0, -9.0
    y[2_000:3_000] = [math.nan] * 1_000
    x, kept = charts.thin(list(range(10_000)), y, 400)
    assert len(x) <= 400 and x[0] == 0 and x[-1] == 9_999 and x == sorted(set(x))
    assert max(v for v in kept if v == v) == 9.0 and min(v for v in kept if v == v) == -9.0
    assert any(math.isnan(v) for v in kept)
    assert charts.thin([1, 2], [3, 4], 400) == ([1, 2], [3, 4])


LABELS = {"title": "Does it fall?", "x_label": "step", "y_label": "loss (nats/token)"}
SVG = "{http://www.w3.org/2000/svg}"


def parsed(*series, **options):
    return ElementTree.fromstring(charts.line_chart(series, **{**LABELS, **options}))


def of_class(root, tag, name):
    return [element for element in root.iter(SVG + tag) if name in element.get("class", "").split()]


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path.get("d"))]


def test_points_lie_on_the_axes_ticks_and_log_axes_space_decades_evenly():
    root = parsed(charts.Series("a", [0, 50, 100], [0.0, 10.0, 5.0]), from_zero=True)
    (path,) = of_class(root, "path", "curve")
    ticks = {text.text: (float(text.get("x")), float(text.get("y")) - 4) for text in of_class(root, "text", "tick")}
    columns, rows = [x for x, _ in points_of(path)], [y for _, y in points_of(path)]
    axis = [text for text in of_class(root, "text", "tick") if "middle" in text.get("class")]
    x_of = {text.text: float(text.get("x")) for text in axis}
    assert columns == pytest.approx([x_of["0"], (x_of["0"] + x_of["100"]) / 2, x_of["100"]], abs=0.11)
    assert rows[1] == pytest.approx(ticks["10"][1], abs=0.11)
    root = parsed(charts.Series("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, -5.0]), log_y=True)
    (path,) = of_class(root, "path", "curve")
    (_, first), (_, second), (_, third) = points_of(path)
    assert first - second == pytest.approx(second - third, abs=0.11) and first > third
    assert json.loads(path.get("data-points"))["y"] == [1, 10, 100, None]
    root = parsed(charts.Series("a", range(5), [1.0, 2.0, math.nan, 2.0, 3.0]))
    (path,) = of_class(root, "path", "curve")
    assert path.get("d").count("M") == 2 and "nan" not in path.get("d")


def test_marks_are_drawn_labelled_and_in_range():
    root = parsed(
        charts.Series("a", [0, 100], [0.5, 0.4]),
        vertical=[charts.Mark(60, "distribution shift"), charts.Mark(61, "close by"), charts.Mark(99, "end")],
        horizontal=[charts.Mark(0.1, "ideal")],
    )
    lines = of_class(root, "line", "mark")
    notes = {text.text: text for text in of_class(root, "text", "note")}
    assert len(lines) == 4 and set(notes) == {"distribution shift", "close by", "end", "ideal"}
    assert float(notes["close by"].get("y")) > float(notes["distribution shift"].get("y"))
    bottom = float(root.get("data-area").split()[3])
    assert float(lines[3].get("y1")) < bottom  # a reference below every curve still lies inside the plot


def test_text_is_escaped_and_unequal_lengths_are_refused():
    name = 'K < 3 & "x"'
    root = parsed(
        charts.Series(name, [0, 1], [0, 1]), charts.Series("b", [0, 1], [1, 0]), title="<script>alert(1)</script>"
    )
    assert of_class(root, "text", "title")[0].text == "<script>alert(1)</script>"
    assert json.loads(of_class(root, "path", "curve")[0].get("data-points"))["name"] == name
    with pytest.raises(ValueError, match="series 'a' has 2 x and 3 y values"):
        parsed(charts.Series("a", [0, 1], [1, 2, 3]))


def test_legend_has_one_key_per_series_and_wraps():
    many = [charts.Series(f"a rather long name of series {i}", [0, 1], [i, i]) for i in range(7)]
    root = parsed(*many)
    assert len(of_class(root, "g", "key")) == 7
    rows = {key.find(f"{SVG}text").get("y") for key in of_class(root, "g", "key")}
    assert len(rows) > 1
    colours = {re.search(r"c\d", path.get("class"))[0] for path in of_class(root, "path", "curve")}
    assert len(colours) == 7
    assert not of_class(parsed(many[0]), "g", "key")


@pytest.mark.parametrize("y", [[], [math.nan], [3.0], [0.0, 0.0]])
def test_degenerate_data_still_draws(y):
    for log_y in (False, True):
        assert "nan" not in charts.line_chart([charts.Series("a", range(len(y)), y)], **LABELS, log_y=log_y).replace(
            "nats", ""
        )


def test_plot_schedule_writes_a_standalone_picture(tmp_path):
    rates = {"max_lr": 3e-4, "constant_lr": 1.65e-4, "min_lr": 3e-5}
    curve = schedule_curve(schedule="cosine_inf", num_steps=1_000, phases=DEFAULT_PHASES["scratch"], **rates)
    path = charts.plot_schedule(tmp_path / "new" / "lr.svg", **vars(curve))
    root = ElementTree.parse(path).getroot()
    assert root.find(f"{SVG}style") is not None
    assert [text.text for text in of_class(root, "text", "note")] == ["warmup", "cooldown", "constant", "anneal"]


def _draw(**changes: object) -> ElementTree.Element:
    settings = {
        "groups": ["unlearn", "retain"],
        "models": {"before": [(0.9, 0.8, 1.0), (0.7, 0.6, 0.8)], "after": [(0.3, 0.2, 0.4), None]},
        "title": "accuracy < 1",
        "x_label": "share",
        **changes,
    }
    return ElementTree.fromstring(charts.interval_chart(settings.pop("groups"), settings.pop("models"), **settings))


def _dots(svg: ElementTree.Element) -> dict[str, tuple[float, float, float]]:
    """Of each dot its label, its place and the ends of its whisker, in pixels."""
    found = {}
    for group in svg.findall(".//{*}g"):
        title, whisker, dot = group
        found[title.text] = tuple(float(value) for value in (dot.get("x1"), whisker.get("x1"), whisker.get("x2")))
    return found


def test_dots_lie_on_one_scale_and_tell_their_numbers():
    dots = _dots(_draw())
    assert set(dots) == {
        "unlearn, before: 0.9 [0.8, 1]",
        "retain, before: 0.7 [0.6, 0.8]",
        "unlearn, after: 0.3 [0.2, 0.4]",
    }
    _, low, high = dots["unlearn, before: 0.9 [0.8, 1]"]
    unit = (high - low) / 0.2
    by_label = {label.split(":")[0]: place for label, (place, _, _) in dots.items()}
    assert math.isclose(by_label["unlearn, before"] - by_label["unlearn, after"], 0.6 * unit, abs_tol=0.3)
    assert math.isclose(by_label["unlearn, before"] - low, 0.1 * unit, abs_tol=0.2)


def test_marks_are_inside_what_is_infinite_is_left_out_and_nothing_is_a_chart_too():
    svg = _draw(vertical=[charts.Mark(1.5, "chance")], x_range=(0.0, 1.0))
    places = [float(line.get("x1")) for line in svg.findall(".//{*}line") if line.get("class") == "mark"]
    assert len(places) == 1 and 0 < places[0] < float(svg.get("width"))
    assert "chance" in [text.text for text in svg.findall(".//{*}text")]
    dots = _dots(_draw(models={"one": [(math.inf, 0.0, 1.0), (0.5, math.nan, 0.6)]}))
    assert set(dots) == {"retain, one: 0.5 [0.5, 0.6]"}
    text = charts.interval_chart([], {}, title="nothing", x_label="")
    assert 'class="chart"' in text and 'class="cursor"' in text and re.search(r'data-area="[\d ]+"', text)
