"""The project's code obeys each rule; a broken one is reported with all its offences at once."""

from collections.abc import Callable

import pytest

from tests.architecture import import_rules, structure_rules, style_rules
from tests.helpers.source_tree import SourceFile, read_project


RULES = [
    import_rules.rooms_import_only_what_the_table_allows,
    import_rules.trainers_never_import_modeling_or_each_other,
    import_rules.front_door_is_lazy,
    import_rules.modeling_is_flat_with_sibling_imports,
    import_rules.only_modeling_imports_relatively,
    import_rules.no_room_is_imported_as_a_top_level_name,
    structure_rules.scripts_are_entry_points,
    structure_rules.nobody_imports_scripts,
    structure_rules.folders_are_not_crowded,
    structure_rules.files_are_no_fragments,
    structure_rules.nothing_is_there_for_tests_alone,
    style_rules.functions_fit_their_limit,
    style_rules.blocks_are_not_nested_deeply,
    style_rules.files_open_with_a_sentence,
    style_rules.names_of_files_say_something,
    style_rules.users_are_never_met_with_assert,
    style_rules.no_error_is_swallowed,
    style_rules.no_environment_variable_is_read,
    style_rules.nothing_is_left_unfinished,
    style_rules.public_functions_are_documented,
    style_rules.arguments_are_typed,
]


@pytest.fixture(scope="module")
def project() -> list[SourceFile]:
    return read_project()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Callable[[list[SourceFile]], list[str]], project: list[SourceFile]) -> None:
    offences = rule(project)
    assert not offences, f"{rule.__name__}, {len(offences)} offences:\n" + "\n".join(offences)


def test_every_room_was_read(project: list[SourceFile]) -> None:
    """A rule over no files would hold for nothing."""
    folders = {file.path.partition("/")[0] for file in project}
    assert folders == {"hf_moe_cpt", "modeling", "trainers", "scripts", "hub_cards", "tests"}
    assert len(project) > 50
