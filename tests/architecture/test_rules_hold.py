"""The project's code obeys each rule; a broken one is reported with all its offences at once."""

import inspect
from collections.abc import Callable

import pytest

from tests.architecture import import_rules, structure_rules, style_rules
from tests.helpers.source_tree import SourceFile, read_project


RULES = [
    function
    for module in (import_rules, structure_rules, style_rules)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and "files" in function.__annotations__ and not name.startswith("_")
]


@pytest.fixture(scope="module")
def project() -> list[SourceFile]:
    return read_project()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[list[SourceFile]], list[str]], project: list[SourceFile]) -> None:
    offences = rule(project)
    assert not offences, f"{rule.__name__}, {len(offences)} offences:\n" + "\n".join(offences)


def test_every_room_was_read(project: list[SourceFile]) -> None:
    """A rule over no files, or no rule, would hold for nothing."""
    folders = {file.path.partition("/")[0] for file in project}
    assert folders == {"hf_moe_cpt", "modeling", "trainers", "scripts", "hub_cards", "tests"}
    assert len(project) > 50 and len(RULES) > 20
