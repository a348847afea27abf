"""Each rule finds its offence in a file made to break it, and nothing in the file's honest twin."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import import_rules, structure_rules, style_rules
from tests.architecture.test_rules_hold import RULES
from tests.helpers.source_tree import SourceFile, read_project


SIX_BLOCKS = "def f():\n" + "".join(f"{' ' * depth}if x:\n" for depth in range(1, 7)) + " " * 7 + "y"
SIX_BRANCHES = "def f():\n if x:\n  y\n" + " elif x:\n  y\n" * 5

A, DATA, CLI = "scripts/a.py", "hf_moe_cpt/data/a.py", "hf_moe_cpt/cli.py"
OURS = "from hf_moe_cpt."
SWALLOWED = "try:\n    x\nexcept Exception:\n    "
# by rule: where the file lies, a text that breaks it, a word of the report, a text that does not
CASES = {
    import_rules.rooms_import_only_what_the_table_allows: [
        ("hf_moe_cpt/optim/a.py", "import transformers", "transformers", "import torch"),
        (DATA, "from hf_moe_cpt import optim", "hf_moe_cpt.optim", "from hf_moe_cpt.data import b"),
        ("modeling/a.py", "def f():\n    import numpy", "numpy", "import torch.nn"),
        ("hub_cards/a.py", "import hf_moe_cpt.cli", "hf_moe_cpt.cli", "import json"),
    ],
    import_rules.trainers_never_import_modeling_or_each_other: [
        ("trainers/cpt/a.py", "from hf_moe_cpt import modeling", "hf_moe_cpt.modeling", "from hf_moe_cpt import data"),
        (
            "trainers/surgery/a.py",
            f"{OURS}trainers.cpt.a import x",
            "trainers.cpt",
            f"{OURS}trainers.common.a import x",
        ),
    ],
    import_rules.front_door_is_lazy: [
        (CLI, "import torch", "torch", "def f():\n    import torch"),
        ("hf_moe_cpt/__init__.py", "import torch", "torch", "import json"),
        (CLI, f"{OURS}data import x", "hf_moe_cpt.data", f"if TYPE_CHECKING:\n    {OURS}data import x"),
    ],
    import_rules.modeling_is_flat_with_sibling_imports: [
        ("modeling/a.py", "from . import a", "from .sibling", "from .a import x"),
        ("modeling/a.py", "from hf_moe_cpt.modeling.a import x", "from .sibling", "from torch import nn"),
        ("modeling/deep/a.py", "import torch", "lies in a folder", None),
    ],
    import_rules.only_modeling_imports_relatively: [
        (DATA, "from .b import x", "full name", "from hf_moe_cpt.data.b import x")
    ],
    import_rules.kernels_start_no_threads: [
        ("hf_moe_cpt/kernels/a.py", "from concurrent.futures import x", "concurrent", "from functools import partial")
    ],
    import_rules.no_room_is_imported_as_a_top_level_name: [
        ("tests/a.py", "from trainers.cpt import x", "write hf_moe_cpt.trainers", f"{OURS}trainers.cpt import x")
    ],
    structure_rules.scripts_are_entry_points: [(A, "x = 1\n" * 151, "151 lines", "x = 1\n" * 150)],
    structure_rules.nobody_imports_scripts: [
        (DATA, f"{OURS}scripts.cpt import x", "hf_moe_cpt.scripts.cpt", f"{OURS}data.cpt import x"),
        (
            "scripts/replication/a.py",
            f"{OURS}scripts.benchmarks.b import x",
            "hf_moe_cpt.scripts.benchmarks.b",
            f"{OURS}scripts.replication.b import x",
        ),
    ],
    structure_rules.folders_are_not_crowded: [
        ([f"hf_moe_cpt/data/a{number}.py" for number in range(16)], "", "has 16 files", None),
        ([f"hf_moe_cpt/data/text_{number}.py" for number in range(4)], "", "text_* is 4 files", None),
    ],
    structure_rules.nothing_is_there_for_tests_alone: [
        (DATA, "def f(): pass", "f is used by nothing", "def plain_f(): pass\ndef f(): pass\nx = f")
    ],
    style_rules.functions_fit_their_limit: [
        (A, "def f():\n" + "    x = 1\n" * 80, "81 lines", "def f():\n" + "    x = 1\n" * 79)
    ],
    style_rules.blocks_are_not_nested_deeply: [(A, SIX_BLOCKS, "6 blocks", SIX_BRANCHES)],
    style_rules.files_open_with_a_sentence: [(A, "x = 1", "docstring", '"""Purpose."""')],
    style_rules.names_of_files_say_something: [("scripts/data_utils.py", "", "says nothing", None)],
    style_rules.users_are_never_met_with_assert: [(A, "assert x", "asserts", "raise ValueError")],
    style_rules.no_error_is_swallowed: [
        (A, "try:\n    x\nexcept:\n    y", "catches", "try:\n    x\nexcept OSError:\n    y"),
        (A, f"{SWALLOWED}y", "catches", f"{SWALLOWED}raise"),
    ],
    style_rules.no_environment_variable_is_read: [
        (A, "os.environ['X']", "os.environ", "os.cpu_count()"),
        (A, "from os import getenv", "getenv", "from os import path"),
    ],
    style_rules.nothing_is_left_unfinished: [
        (A, "x = 1  # TODO later", "TODO", "x = 'TODO'"),
        (A, "raise NotImplementedError", "NotImplementedError", "raise ValueError"),
    ],
    style_rules.public_functions_are_documented: [(A, "def f(): pass", "docstring", "def f():\n    'Does.'")],
    style_rules.arguments_are_typed: [(A, "def f(x): pass", "no type", "def f(self, x: int): pass")],
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
