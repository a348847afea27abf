"""Open a page in headless Chromium, let a script act on it, and read what it shows then."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

ANSWER = "answer-of-the-test"
REPORT_ERRORS = """<script>
window.problems = [];
addEventListener("error", event => problems.push(event.message));
</script>"""


def ask_page(path: Path, questions: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The answer to each question, all of one visit, as JSON; errors of the page's scripts fail the test.

    questions: by name, what stands behind the # sign of the address, and the body of a function that runs then.
    """
    asked = "".join(_asked(name, *question) for name, question in questions.items())
    page = path.read_text(encoding="utf-8")
    asking = (
        f"<script>{{const answer = {{}}; {asked} const place = document.createElement('pre');"
        f"place.id = '{ANSWER}'; place.textContent = encodeURIComponent(JSON.stringify({{answer, problems}}));"
        "document.body.append(place);}</script>"
    )
    copy = path.with_name(f"asked-{path.name}")
    page = page.replace("<head>", "<head>" + REPORT_ERRORS, 1)
    cut = page.rindex("</body>")
    copy.write_text(page[:cut] + asking + page[cut:], encoding="utf-8")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
    words += ["--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=800, check=True)
    _, _, found = done.stdout.partition(f'<pre id="{ANSWER}">')
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return _decoded(found.partition("</pre>")[0])


def _asked(name: str, address: str, script: str) -> str:
    """The page reads its address when it changes, but only after the running script: so it is told to."""
    go = f"history.replaceState(null, '', {_literal('#' + address)}); readAddress(); drawAll();"
    return f"{go} answer[{_literal(name)}] = (() => {{{script}}})();"


def _literal(text: str) -> str:
    """A text in a script; a name such as "<!--" would change how the page is read."""
    return json.dumps(text).replace("<", "\\u003c")


def _decoded(text: str) -> Any:
    result = json.loads(unquote(text))
    assert result["problems"] == [], result["problems"]
    return result["answer"]
