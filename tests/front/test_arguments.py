"""YAML under the command line: who wins, and what is refused, from a file as from flags and from Python."""

import contextlib
import math
import re
import shlex
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hf_moe_cpt import cli
from hf_moe_cpt.arguments import parse_arguments, path_of_config
from hf_moe_cpt.settings import check_settings, check_values
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from tests.helpers.hostile_inputs import numbers_of
from tests.helpers.source_tree import PROJECT


@dataclass
class Arguments:
    name: str = field(metadata={"help": "needed"})
    rate: float = field(default=1.0, metadata={"help": "a number"})
    names: list[str] | None = field(default=None, metadata={"help": "several"})
    flag: bool = field(default=False, metadata={"help": "a switch"})


def _parse(*argv: str) -> Arguments:
    return parse_arguments((Arguments,), argv, program="test", description="")[0]


def test_command_line_over_file_over_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: from file\nrate: 3e-4\nnames: [a, b]\n")
    assert _parse("--config", str(file)) == Arguments("from file", 3e-4, ["a", "b"])
    assert _parse(f"--config={file}", "--name", "typed", "--flag") == Arguments("typed", 3e-4, ["a", "b"], True)
    assert _parse("--name", "typed") == Arguments("typed")


REFUSED = {
    "unknown key": ("name: x\nrat: 2\n", "sets 'rat', which is no argument: did you mean 'rate'"),
    "no mapping": ("- a\n", "must hold `argument: value` lines, got list"),
    "no YAML": ("a: [1\n", "cannot be used .ParserError: while parsing a flow sequence"),
    "a key twice": ("rate: 1\nrate: 2\n", "the key .rate. is given twice"),
    "deep": ("a: " + "[" * 1500, "cannot be used .RecursionError"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_bad_files_are_refused_with_one_line(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        _parse("--config", str(file))
    assert "\n" not in str(caught.value)


def test_a_recipe_is_found_by_its_name():
    """Its own keys come back: the file itself, read by YAML alone, is the reference."""
    recipe = Path(path_of_config("recipe:surgery_paper"))
    kinds = [(key, type(value), None) for key, value in yaml.safe_load(recipe.read_text()).items()]
    wanted = (make_dataclass("Wanted", kinds),)
    (found,) = parse_arguments(wanted, ["--config", "recipe:surgery_paper"], program="test", description="")
    assert vars(found) == yaml.safe_load(recipe.read_text())


def test_a_missing_file_is_named_and_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match="missing.yaml' cannot be read: No such file"):
        _parse("--config", "missing.yaml")
    with pytest.raises(ValueError, match="'recipe:surgery_saef': no recipe has this name, choose from cpt_code,"):
        _parse("--config", "recipe:surgery_saef")


@dataclass
class Bounded:
    """Settings of every type, for tests."""

    share: float = field(default=0.5, metadata={"range": "[0, 1)", "help": "Share that is held out."})
    weight: float = 1.0
    count: int | None = field(default=None, metadata={"range": "[1, inf)"})
    name: str = "a"
    switch: bool = False
    names: list[str] | None = None
    phases: list[float] | None = None
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})
    learning_rate: float = 1e-3
    more: dict | str | None = None
    some_kwargs: dict | str | None = None

    def __post_init__(self) -> None:
        check_settings(self)


OUT_OF_BOUNDS = {
    "share: 1.0": r"--share 1.0 is outside \[0, 1\): share that is held out.",
    "share: .nan": r"--share nan is outside \[0, 1\)",
    "share: true": "--share True is no float",
    "weight: .inf": "--weight inf is no finite number.",
    "weight: 2001-01-01": "--weight datetime.date.2001, 1, 1. is no float",
    "count: 1.5": "--count 1.5 is no int",
    "count: 0": r"--count 0 is outside \[1, inf\)",
    "count: 99999999999999999999": "has more than 64 bits",
    "name: no": "--name False is no str",
    "switch: 1": "--switch 1 is no bool",
    "names: [1]": r"--names \[1\] is no list",
    "phases: [.nan]": r"--phases \[nan\] is no finite number",
    "kind: c": "--kind 'c' is unknown: choose from a, b.",
    "learning_rate: true": "--learning_rate True is no float",
    "learning_rate: -1": r"--learning_rate -1 is outside \[0, inf\)",
    "some_kwargs: '0'": "--some_kwargs '0' is no JSON object",
    "more: [1]": r"--more \[1\] is no dict or str",
}


@pytest.mark.parametrize("line", OUT_OF_BOUNDS)
def test_a_file_is_held_to_types_and_ranges(tmp_path, line):
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(ValueError, match=OUT_OF_BOUNDS[line]):
        parse_arguments((Bounded,), ["--config", str(tmp_path / "a.yaml")], program="test", description="")


def test_what_is_allowed_is_taken_from_files_and_flags(tmp_path):
    lines = ["share: 0", "weight: 3e-4", "count: null", "names: x", "more: {a: 1}", "phases: [1, 0.5]", "switch: true"]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    words = ["--config", str(tmp_path / "a.yaml"), "--count", "2"]
    (found,) = parse_arguments((Bounded,), words, program="test", description="")
    assert found == Bounded(0, 3e-4, 2, "a", True, ["x"], [1, 0.5], more={"a": 1})


FLAGS = {
    "schedule": ["--max_steps", "10", "--learning_rate", "nan"],
    "plan": ["--preset", "pb-granular-tiny", "--terms", "-1"],
    "upcycle": ["dense", "--output_dir", "out", "--router_std", "inf"],
    "cpt": ["--dataset_name", "a.txt", "--max_steps", "1", "--held_out_fraction", "nan"],
    "rainbowpo": ["--dataset_name", "a.jsonl", "--weight_decay", "-1"],
    "surgery": ["--adam_beta2", "1"],
    "rejection-sample": ["--dataset_name", "a.jsonl", "--output_dir", "out", "--temperature", "nan"],
    "eval-preference": ["--output_dir", "out", "--confidence", "nan"],
    "surgery-eval": ["--before", "x", "--bench", "x", "--output_dir", "out", "--relearn_lr", "inf"],
    "analyze": ["--batch_size", "99999999999999999999"],
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_of_every_command_are_held_to_ranges(command, capsys):
    assert cli.main([command, *FLAGS[command]]) == cli.USER_ERROR
    *_, option, value = FLAGS[command]
    assert re.search(rf"^error: {option} {value}(\.0)? (is outside|is no finite|has more)", capsys.readouterr().err)


ENDLESS = {"max_grad_norm", "tau"}  # infinity means: no limit, the best alone


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_number_of_any_command_is_nan_true_endless_or_of_more_than_64_bits(command):
    taken = set()
    for kind in import_module(cli.COMMANDS[command].module).ARGUMENTS:
        for option, is_list in numbers_of(kind).items():
            for value in (math.nan, math.inf, -math.inf, True, 10**20):
                with contextlib.suppress(ValueError):
                    check_values(kind, {option: [value] if is_list else value})
                    taken.add((option, value))
    assert taken <= {(name, math.inf) for name in ENDLESS}


@pytest.mark.parametrize("value", [True, -1.0, math.nan, "0.1"])
@pytest.mark.parametrize("config", [CPTConfig, RainbowPOConfig, SurgeryConfig])
def test_python_is_held_to_the_same_ranges(config, value, tmp_path):
    with pytest.raises(ValueError, match="^weight_decay="):
        config(str(tmp_path), max_steps=1, weight_decay=value)


def test_readme_shows_each_operation_in_five_lines_of_shell_that_parse_and_ten_of_python():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"```bash\nhf-moe-cpt (.*?)```\n\n```python\n(.*?)```", readme, re.DOTALL)
    for shell, python in shown:
        name, *words = shlex.split(shell.replace("\\\n", " "))
        arguments = import_module(f"hf_moe_cpt.scripts.{name}").ARGUMENTS
        here = ("--use_cpu", "True", "--bf16", "False")
        start, *_ = parse_arguments(arguments, [*words, *here], program=name, description="")
        assert f'"{start.model_name_or_path}"' in python  # the same on both ways
        assert shell.count("\n") <= 5 and len(list(filter(None, python.splitlines()))) <= 10
        compile(python, "README.md", "exec")
    assert [shell.split()[0] for shell, _ in shown] == ["cpt", "rainbowpo", "surgery"]
