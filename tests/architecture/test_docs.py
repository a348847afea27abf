"""The documents name what exists, link to what exists, and their first example runs."""

import importlib
import re
from pathlib import Path

import pytest

import hf_moe_cpt
from hf_moe_cpt import cli
from tests.helpers.source_tree import PROJECT, SourceFile, read_project


README = (PROJECT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")])


def public_names(files: list[SourceFile]) -> set[str]:
    """`__all__` of every package of ours."""
    packages = [file.module for file in files if file.path.endswith("/__init__.py") and not file.is_test]
    return {name for package in packages for name in getattr(importlib.import_module(package), "__all__", ())}


def relative_targets(document: Path) -> list[str]:
    """Targets of markdown links that have no scheme."""
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken_links(document: Path) -> list[str]:
    """Relative targets of markdown links that are neither a file nor a heading of one."""
    broken = []
    for target in relative_targets(document):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(f"{document.relative_to(document.parents[1])}: {target}")
    return broken


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_docs_name_every_public_name() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "docs").rglob("*.md"))
    names = public_names(read_project())
    assert set(hf_moe_cpt.__all__) < names
    missing = sorted(name for name in names if not re.search(rf"\b{name}\b", text))
    assert not missing, f"docs/ does not name {', '.join(missing)}"


def test_docs_name_every_command() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    missing = [name for name in cli.COMMANDS if f"hf-moe-cpt {name}" not in text]
    assert not missing, f"no document shows {missing}"


def test_links_lead_somewhere() -> None:
    broken = [link for document in DOCUMENTS for link in broken_links(document)]
    assert not broken, "\n".join(broken)


def test_the_site_has_every_page_once_and_its_links_stay_inside() -> None:
    """What `make docs` builds: a page that no menu names is not found, and a link out of docs/ leads nowhere there."""
    menu = re.findall(r"^ +- (\S+\.md)$", (PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path for path in DOCUMENTS if PROJECT / "docs" in path.parents]
    assert sorted(menu) == sorted(path.relative_to(PROJECT / "docs").as_posix() for path in pages)
    targets = [(page, target) for page in pages for target in relative_targets(page)]
    assert len(targets) > 100
    outside = [
        f"{page.name}: {target}"
        for page, target in targets
        if not (page.parent / target.partition("#")[0]).resolve().is_relative_to(PROJECT / "docs")
    ]
    assert not outside, "\n".join(outside)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "# A heading: here\n[a](#a-heading-here) [b](page.md) [c](none.md) [d](page.md#none) [e](https://x.y)"
    )
    assert broken_links(page) == ["docs/page.md: none.md", "docs/page.md: page.md#none"]


def test_readme_shows_the_two_commands_and_python_at_once() -> None:
    lines = README.splitlines()
    assert lines.index("```python") < 20
    assert "make quickstart" in README[: README.index("```python")]
    assert "make test" in README[: README.index("```python")]


def test_first_example_of_the_readme_runs(capsys: pytest.CaptureFixture) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), {})
    total, active = re.findall(r"[\d,]{5,}", capsys.readouterr().out)
    assert int(active.replace(",", "")) < int(total.replace(",", ""))
