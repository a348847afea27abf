"""The report is one well-formed page that loads nothing and holds the numbers it was given."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hf_moe_cpt.reports import Section, Series, format_cell, line_chart, write_csv, write_report
from tests.helpers.source_tree import PROJECT


@pytest.mark.parametrize(
    "text", ["=1+1", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "\ufeff@x", "-1", "a\r=1", "a\r\n+1", "\u200b=1"]
)
def test_a_text_is_no_formula_of_a_spreadsheet_and_ends_no_row(text, tmp_path):
    """As Python's csv reads it, and as a reader does for which a carriage return ends a row."""
    write_csv(tmp_path / "a.csv", [{"plain": -1.5, text: text}])
    raw = (tmp_path / "a.csv").read_bytes().decode()
    (head, row) = csv.reader(io.StringIO(raw, newline=""))
    assert row[0] == "-1.5" and "\r" not in raw
    for cell in (head[1], row[1]):
        assert cell.startswith("'") or cell.startswith("a\n")


VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Collects tag balance, addresses to load, and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


ROWS = [
    {"run": "granular <30 %>", "forgetting": 0.13664, "recovery step": 200, "tokens/s": 12_345.6},
    {"run": "none", "forgetting": -0.7, "recovery step": None, "tokens/s": 9_999.0, "note": "only here"},
]


@pytest.fixture
def page(tmp_path):
    chart = line_chart([Series("a", [0, 1], [1, 2])], title="Is it?", x_label="step", y_label="loss")
    sections = [Section("Did replay help?", "First.\n\nSecond & <last>.", ROWS), Section("And then?", charts=[chart])]
    return write_report(tmp_path / "out" / "report.html", "What happened?", sections).read_text(encoding="utf-8")


def test_page_is_balanced_loads_nothing_and_holds_the_numbers_in_order(page):
    parsed = Page(page)
    assert parsed.open == [] and parsed.addresses == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    assert "prefers-color-scheme:dark" in page
    assert Page(page).cells == [
        *("run", "forgetting", "recovery step", "tokens/s", "note"),
        *("granular <30 %>", "0.1366", "200", "12,346", "–"),
        *("none", "-0.7000", "–", "9999", "only here"),
    ]
    assert '<td class="number">0.1366</td>' in page and '<td class="number">200</td>' in page
    assert "<p>First.</p><p>Second &amp; &lt;last&gt;.</p>" in page
    assert page.count("<svg") == 1 and page.count("<script>") == 1


def test_rewriting_replaces_and_leaves_no_scrap(tmp_path):
    for title in ("one", "two"):
        write_report(tmp_path / "report.html", title, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<h1>two</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (float("nan"), "–"), (True, "yes"), (1234567, "1,234,567"), (3e-5, "3e-05"), ("x", "x"), (2.0, "2")],
)
def test_cells(value, text):
    assert format_cell(value) == text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("script", sorted((PROJECT / "hf_moe_cpt").glob("*/page/*.js")), ids=lambda path: path.name)
def test_scripts_of_pages_are_javascript(script):
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
