"""Each rule finds its offence in a file made to break it, and nothing in the file's honest twin."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import import_rules, structure_rules, style_rules
from tests.architecture.test_rules_hold import RULES
from tests.helpers.source_tree import SourceFile, read_project


SIX_BLOCKS = "def f():\n" + "".join(f"{' ' * depth}if x:\n" for depth in range(1, 7)) + " " * 7 + "y"
SIX_BRANCHES = "def f():\n if x:\n  y\n" + " elif x:\n  y\n" * 5

# by rule: where the file lies, a text that breaks it, a word of the report, a text that does not
CASES = {
    import_rules.rooms_import_only_what_the_table_allows: [
        ("hf_moe_cpt/optim/a.py", "import transformers", "transformers", "import torch"),
        ("hf_moe_cpt/data/a.py", "from hf_moe_cpt import optim", "hf_moe_cpt.optim", "from hf_moe_cpt.data import b"),
        ("modeling/a.py", "def f():\n    import numpy", "numpy", "import torch.nn"),
        ("hub_cards/a.py", "import hf_moe_cpt.cli", "hf_moe_cpt.cli", "import json"),
    ],
    import_rules.trainers_never_import_modeling_or_each_other: [
        ("trainers/cpt/a.py", "from hf_moe_cpt import modeling", "hf_moe_cpt.modeling", "from hf_moe_cpt import data"),
        (
            "trainers/surgery/a.py",
            "from hf_moe_cpt.trainers.cpt.cpt_trainer import x",
            "trainers.cpt",
            "from hf_moe_cpt.trainers.common.metrics import x",
        ),
    ],
    import_rules.front_door_is_lazy: [
        ("hf_moe_cpt/cli.py", "import torch", "torch", "def f():\n    import torch"),
        ("hf_moe_cpt/__init__.py", "import torch", "torch", "import json"),
        (
            "hf_moe_cpt/cli.py",
            "from hf_moe_cpt.data import packing",
            "hf_moe_cpt.data",
            "if TYPE_CHECKING:\n    from hf_moe_cpt.data import packing",
        ),
    ],
    import_rules.modeling_is_flat_with_sibling_imports: [
        ("modeling/a.py", "from . import a", "from .sibling", "from .a import x"),
        ("modeling/a.py", "from hf_moe_cpt.modeling.a import x", "from .sibling", "from torch import nn"),
        ("modeling/deep/a.py", "import torch", "lies in a folder", None),
    ],
    import_rules.only_modeling_imports_relatively: [
        ("hf_moe_cpt/data/a.py", "from .b import x", "full name", "from hf_moe_cpt.data.b import x")
    ],
    import_rules.no_room_is_imported_as_a_top_level_name: [
        (
            "tests/a.py",
            "from trainers.cpt import x",
            "write hf_moe_cpt.trainers",
            "from hf_moe_cpt.trainers.cpt import x",
        )
    ],
    structure_rules.scripts_are_entry_points: [("scripts/a.py", "x = 1\n" * 151, "151 lines", "x = 1\n" * 150)],
    structure_rules.nobody_imports_scripts: [
        (
            "hf_moe_cpt/data/a.py",
            "from hf_moe_cpt.scripts.cpt import x",
            "hf_moe_cpt.scripts.cpt",
            "from hf_moe_cpt.data.cpt import x",
        ),
        (
            "scripts/replication/a.py",
            "from hf_moe_cpt.scripts.benchmarks.harness import x",
            "hf_moe_cpt.scripts.benchmarks.harness",
            "from hf_moe_cpt.scripts.replication.harness import x",
        ),
    ],
    structure_rules.folders_are_not_crowded: [
        ([f"hf_moe_cpt/data/a{number}.py" for number in range(16)], "", "has 16 files", None),
        ([f"hf_moe_cpt/data/text_{number}.py" for number in range(4)], "", "text_* is 4 files", None),
    ],
    structure_rules.nothing_is_there_for_tests_alone: [
        ("hf_moe_cpt/data/a.py", "def f(): pass", "f is used by nothing", "def plain_f(): pass\ndef f(): pass\nx = f")
    ],
    style_rules.functions_fit_their_limit: [
        ("scripts/a.py", "def f():\n" + "    x = 1\n" * 80, "81 lines", "def f():\n" + "    x = 1\n" * 79)
    ],
    style_rules.blocks_are_not_nested_deeply: [("scripts/a.py", SIX_BLOCKS, "6 blocks", SIX_BRANCHES)],
    style_rules.files_open_with_a_sentence: [("scripts/a.py", "x = 1", "docstring", '"""Purpose."""')],
    style_rules.names_of_files_say_something: [("scripts/data_utils.py", "", "says nothing", None)],
    style_rules.users_are_never_met_with_assert: [("scripts/a.py", "assert x", "asserts", "raise ValueError")],
    style_rules.no_error_is_swallowed: [
        ("scripts/a.py", "try:\n    x\nexcept:\n    y", "catches", "try:\n    x\nexcept OSError:\n    y"),
        (
            "scripts/a.py",
            "try:\n    x\nexcept Exception:\n    y",
            "catches",
            "try:\n    x\nexcept Exception:\n    raise",
        ),
    ],
    style_rules.no_environment_variable_is_read: [
        ("scripts/a.py", "os.environ['X']", "os.environ", "os.cpu_count()"),
        ("scripts/a.py", "from os import getenv", "getenv", "from os import path"),
    ],
    style_rules.nothing_is_left_unfinished: [
        ("scripts/a.py", "x = 1  # TODO later", "TODO", "x = 'TODO'"),
        ("scripts/a.py", "raise NotImplementedError", "NotImplementedError", "raise ValueError"),
    ],
    style_rules.public_functions_are_documented: [
        ("scripts/a.py", "def f(): pass", "docstring", "def f():\n    'Does.'")
    ],
    style_rules.arguments_are_typed: [("scripts/a.py", "def f(x): pass", "no type", "def f(self, x: int): pass")],
}


def read_alone(root: Path, paths: str | list[str], text: str) -> list[SourceFile]:
    for path in [paths] if isinstance(paths, str) else paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return read_project(root)


@pytest.mark.parametrize(
    "rule, path, bad, word, good",
    [pytest.param(rule, *case, id=f"{rule.__name__}-{case[2]}") for rule, cases in CASES.items() for case in cases],
)
def test_rule_can_fail(
    rule: Callable[[list[SourceFile]], list[str]],
    path: str | list[str],
    bad: str,
    word: str,
    good: str | None,
    tmp_path: Path,
) -> None:
    offences = rule(read_alone(tmp_path / "bad", path, bad))
    assert len(offences) == 1
    assert word in offences[0]
    if good is not None:
        assert rule(read_alone(tmp_path / "good", path, good)) == []


def test_a_file_with_one_importer_is_a_fragment(tmp_path: Path) -> None:
    """Eleven of them are named with their importer; ten are borne."""
    parts = [f"hf_moe_cpt/optim/part{number}.py" for number in range(11)]
    whole = [f"from hf_moe_cpt.optim.part{number} import x" for number in range(11)]
    for name, second in (("one", ""), ("two", whole[0])):
        read_alone(tmp_path / name, [*parts], "x = 1\n")
        (tmp_path / name / "hf_moe_cpt/optim/whole.py").write_text("\n".join(whole), encoding="utf-8")
        (tmp_path / name / "hf_moe_cpt/optim/second.py").write_text(second, encoding="utf-8")
    read_project.cache_clear()
    offences = structure_rules.files_are_no_fragments(read_project(tmp_path / "one"))
    assert len(offences) == 11
    assert "hf_moe_cpt/optim/part0.py has 1 lines and one importer, hf_moe_cpt/optim/whole.py" in offences
    assert structure_rules.files_are_no_fragments(read_project(tmp_path / "two")) == []


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() | {structure_rules.files_are_no_fragments} == set(RULES)
