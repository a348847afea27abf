"""Dots on whiskers: where they are, what they tell, and what is left out."""

import math
import re
from xml.etree import ElementTree

from hf_moe_cpt.analysis.chart import Mark
from hf_moe_cpt.scripts.eval_surgery_chart import interval_chart


def _draw(**changes: object) -> ElementTree.Element:
    settings = {
        "groups": ["unlearn", "retain"],
        "models": {"before": [(0.9, 0.8, 1.0), (0.7, 0.6, 0.8)], "after": [(0.3, 0.2, 0.4), None]},
        "title": "accuracy < 1",
        "x_label": "share",
        **changes,
    }
    return ElementTree.fromstring(interval_chart(settings.pop("groups"), settings.pop("models"), **settings))


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


def test_marks_and_ranges_are_inside():
    svg = _draw(vertical=[Mark(1.5, "chance")], x_range=(0.0, 1.0))
    places = [float(line.get("x1")) for line in svg.findall(".//{*}line") if line.get("class") == "mark"]
    assert len(places) == 1 and 0 < places[0] < float(svg.get("width"))
    assert "chance" in [text.text for text in svg.findall(".//{*}text")]


def test_what_is_infinite_is_left_out_and_a_missing_end_is_the_dot():
    dots = _dots(_draw(models={"one": [(math.inf, 0.0, 1.0), (0.5, math.nan, 0.6)]}))
    assert set(dots) == {"retain, one: 0.5 [0.5, 0.6]"}


def test_it_fits_the_script_of_the_report():
    text = interval_chart([], {}, title="nothing", x_label="")
    assert 'class="chart"' in text and 'class="cursor"' in text and re.search(r'data-area="[\d ]+"', text)
