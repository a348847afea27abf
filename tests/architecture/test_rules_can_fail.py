"""Each rule finds its offence in a file made to break it, and nothing in the file's honest twin."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import import_rules, style_rules
from tests.architecture.test_rules_hold import RULES
from tests.helpers.source_tree import SourceFile, read_project


SIX_BLOCKS = "def f():\n" + "".join(f"{' ' * depth}if x:\n" for depth in range(1, 7)) + " " * 7 + "y"
SIX_BRANCHES = "def f():\n if x:\n  y\n" + " elif x:\n  y\n" * 5

# rule, where the file lies, a text that breaks it, a word of the report, a text that does not
CASES = [
    (
        import_rules.rooms_import_only_what_the_table_allows,
        "hf_moe_cpt/optim/a.py",
        "import transformers",
        "transformers",
        "import torch",
    ),
    (
        import_rules.rooms_import_only_what_the_table_allows,
        "hf_moe_cpt/data/a.py",
        "from hf_moe_cpt import optim",
        "hf_moe_cpt.optim",
        "from hf_moe_cpt.data import b",
    ),
    (
        import_rules.rooms_import_only_what_the_table_allows,
        "modeling/a.py",
        "def f():\n    import numpy",
        "numpy",
        "import torch.nn",
    ),
    (
        import_rules.rooms_import_only_what_the_table_allows,
        "hub_cards/a.py",
        "import hf_moe_cpt.cli",
        "hf_moe_cpt.cli",
        "import json",
    ),
    (
        import_rules.trainers_never_import_modeling_or_each_other,
        "trainers/cpt/a.py",
        "from hf_moe_cpt import modeling",
        "hf_moe_cpt.modeling",
        "from hf_moe_cpt import data",
    ),
    (
        import_rules.trainers_never_import_modeling_or_each_other,
        "trainers/surgery/a.py",
        "from hf_moe_cpt.trainers.cpt.cpt_trainer import x",
        "trainers.cpt",
        "from hf_moe_cpt.trainers.instruments.meter import x",
    ),
    (import_rules.front_door_is_lazy, "hf_moe_cpt/cli.py", "import torch", "torch", "def f():\n    import torch"),
    (
        import_rules.front_door_is_lazy,
        "hf_moe_cpt/cli.py",
        "from hf_moe_cpt.data import packing",
        "hf_moe_cpt.data",
        "if TYPE_CHECKING:\n    from hf_moe_cpt.data import packing",
    ),
    (
        import_rules.modeling_is_flat_with_sibling_imports,
        "modeling/a.py",
        "from . import a",
        "from .sibling",
        "from .a import x",
    ),
    (
        import_rules.modeling_is_flat_with_sibling_imports,
        "modeling/a.py",
        "from hf_moe_cpt.modeling.a import x",
        "from .sibling",
        "from torch import nn",
    ),
    (
        import_rules.modeling_is_flat_with_sibling_imports,
        "modeling/deep/a.py",
        "import torch",
        "lies in a folder",
        None,
    ),
    (
        import_rules.only_modeling_imports_relatively,
        "hf_moe_cpt/data/a.py",
        "from .b import x",
        "full name",
        "from hf_moe_cpt.data.b import x",
    ),
    (
        import_rules.no_room_is_imported_as_a_top_level_name,
        "tests/a.py",
        "from trainers.cpt import x",
        "write hf_moe_cpt.trainers",
        "from hf_moe_cpt.trainers.cpt import x",
    ),
    (style_rules.files_fit_their_limit, "scripts/a.py", "x = 1\n" * 401, "401 lines", "x = 1\n" * 400),
    (
        style_rules.functions_fit_their_limit,
        "scripts/a.py",
        "def f():\n" + "    x = 1\n" * 80,
        "81 lines",
        "def f():\n" + "    x = 1\n" * 79,
    ),
    (style_rules.blocks_are_not_nested_deeply, "scripts/a.py", SIX_BLOCKS, "6 blocks", SIX_BRANCHES),
    (style_rules.files_open_with_a_sentence, "scripts/a.py", "x = 1", "docstring", '"""Purpose."""'),
    (style_rules.names_of_files_say_something, "scripts/data_utils.py", "", "says nothing", None),
    (style_rules.users_are_never_met_with_assert, "scripts/a.py", "assert x", "asserts", "raise ValueError"),
    (
        style_rules.no_error_is_swallowed,
        "scripts/a.py",
        "try:\n    x\nexcept:\n    y",
        "catches",
        "try:\n    x\nexcept OSError:\n    y",
    ),
    (
        style_rules.no_error_is_swallowed,
        "scripts/a.py",
        "try:\n    x\nexcept Exception:\n    y",
        "catches",
        "try:\n    x\nexcept Exception:\n    raise",
    ),
    (style_rules.no_environment_variable_is_read, "scripts/a.py", "os.environ['X']", "os.environ", "os.cpu_count()"),
    (
        style_rules.no_environment_variable_is_read,
        "scripts/a.py",
        "from os import getenv",
        "getenv",
        "from os import path",
    ),
    (style_rules.nothing_is_left_unfinished, "scripts/a.py", "x = 1  # TODO later", "TODO", "x = 'TODO'"),
    (
        style_rules.nothing_is_left_unfinished,
        "scripts/a.py",
        "raise NotImplementedError",
        "NotImplementedError",
        "raise ValueError",
    ),
    (
        style_rules.public_functions_are_documented,
        "scripts/a.py",
        "def f(): pass",
        "docstring",
        "def f():\n    'Does.'",
    ),
    (style_rules.arguments_are_typed, "scripts/a.py", "def f(x): pass", "no type", "def f(self, x: int): pass"),
]


def read_alone(root: Path, path: str, text: str) -> list[SourceFile]:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    return read_project(root)


@pytest.mark.parametrize("rule, path, bad, word, good", CASES, ids=[f"{case[0].__name__}-{case[3]}" for case in CASES])
def test_rule_can_fail(
    rule: Callable[[list[SourceFile]], list[str]], path: str, bad: str, word: str, good: str | None, tmp_path: Path
) -> None:
    offences = rule(read_alone(tmp_path / "bad", path, bad))
    assert len(offences) == 1
    assert word in offences[0]
    if good is not None:
        assert rule(read_alone(tmp_path / "good", path, good)) == []


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(RULES)
