"""The command line of every command: help without imports, both spellings, near names, errors in one line."""

import dataclasses
import importlib
import json
from dataclasses import dataclass, field

import pytest

from hf_moe_cpt import cli
from hf_moe_cpt.arguments import SettingsParser, given_values, parse_arguments
from hf_moe_cpt.cli import SourceModule, command_help, format_help
from tests.helpers.fresh_process import run_python


MOST_LINES = 270  # cpt's were 771; of surgery all are ours
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "numpy")
ALL_HELP = f"""
import contextlib, io, json, os, sys
os.environ["COLUMNS"] = "100"
sys.modules["trl"] = None  # as where it is not installed
from hf_moe_cpt import cli
shown = {{}}
for name in cli.COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = cli.main([name, "--help"])
    shown[name] = [code, text.getvalue(), [m for m in {HEAVY} if sys.modules.get(m)]]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def shown() -> dict[str, tuple[int, str, list[str]]]:
    """What `--help` of every command gives in a process without TRL: exit code, text, heavy packages loaded so far."""
    return json.loads(run_python("-c", ALL_HELP).stdout)


def _settings(name: str) -> tuple[type, ...]:
    return importlib.import_module(cli.COMMANDS[name].module).ARGUMENTS


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_short_and_loads_nothing(name: str, shown: dict) -> None:
    code, text, heavy = shown[name]
    assert (code, heavy) == (0, [])
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: hf-moe-cpt {name} ") and len(lines) < MOST_LINES
    assert all(len(line) < 120 for line in lines)
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(options) == len(set(options)) and not any("-" in option[2:] for option in options)
    assert all(len(line.split()) > 1 for line in lines if line.startswith("  --"))  # each is explained


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_read_from_the_source_is_that_of_the_classes(
    name: str, shown: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert shown[name][1] == format_help(f"hf-moe-cpt {name}", module.__doc__, module.ARGUMENTS) + "\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_both_spellings_are_taken(name: str) -> None:
    parser = SettingsParser(_settings(name), name)
    taken = parser._option_string_actions
    positional = [action.dest for action in parser._actions if not action.option_strings]
    for option in (item.name for kind in _settings(name) for item in dataclasses.fields(kind) if item.init):
        assert option in positional or taken[f"--{option}"] is taken[f"--{option.replace('_', '-')}"]


@pytest.mark.parametrize("name", ["cpt", "plan"])
def test_help_all_adds_what_other_packages_define(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(cli.COMMANDS[name].module).main(["--help-all"])
    options = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    fields = {f"--{item.name}" for kind in _settings(name) for item in dataclasses.fields(kind) if item.init}
    assert stop.value.code == 0 and fields <= options


@dataclass
class Settings:
    """Some settings, for tests."""

    source: str = field(metadata={"positional": True, "help": "where from"})
    num_steps: int = field(metadata={"help": "how many"})
    link: str = field(default="a", metadata={"help": "which", "choices": ["a", "b"]})
    as_chat: bool = field(default=True, metadata={"help": "whether 6 %% are left"})


def _parse(*words: str) -> Settings:
    return parse_arguments((Settings,), words, program="test", description="For tests.")[0]


@pytest.mark.parametrize(
    "words", [("x", "--num_steps", "3", "--no_as_chat"), ("--num-steps=3", "--as-chat", "no", "x")], ids=str
)
def test_words_become_settings(words: tuple[str, ...]) -> None:
    assert _parse(*words) == Settings("x", 3, "a", False)


def test_a_file_may_name_what_the_command_line_needs(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("source: y\nnum_steps: 4\n")
    assert _parse("--config", str(tmp_path / "a.yaml")) == Settings("y", 4)
    assert given_values(["--num-steps", "7"], "num_steps") == {"num_steps": "7"}


REFUSED = {
    "mistyped": (("x", "--num-stps", "3"), "--num-stps is no option of test: did you mean --num_steps?"),
    "mistyped before missing": (("--numsteps=3",), "--numsteps is no option of test: did you mean --num_steps?"),
    "unknown": (("--zzzzzzz",), "--zzzzzzz is no option of test: test --help lists the options."),
    "missing": (("x",), "--num_steps is missing: give it, test --help says what it is."),
    "missing word": (("--num_steps", "3"), "SOURCE is missing: give it, test --help says what it is."),
    "one word more": (("x", "--num_steps", "3", "y"), "'y' belongs to no option: test --help lists them."),
    "no number": (("x", "--num_steps", "many"), "--num_steps 'many' is no int."),
    "unknown choice": (("x", "--num_steps", "3", "--link", "c"), "--link 'c' is unknown: choose from a, b."),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_a_wrong_line_is_refused_with_one_line(words, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        _parse(*words)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


def test_help_of_settings(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        _parse("-h")
    assert capsys.readouterr().out.splitlines()[:8] == [
        "usage: test SOURCE --num_steps NUM_STEPS [--config FILE] [--option VALUE ...]",
        "",
        "For tests.",
        "",
        "Some settings, for tests:",
        "  SOURCE                          where from (needed)",
        "  --num_steps                     how many (needed)",
        "  --link                          which One of a, b. (default: a)",
    ]


def test_only_what_is_asked_for_runs() -> None:
    source = SourceModule("hf_moe_cpt.optim.schedules")
    assert list(source["SCHEDULES"]) == list(importlib.import_module("hf_moe_cpt.optim.schedules").SCHEDULES)
    assert "Boundaries" not in dict.keys(source)
    with pytest.raises(KeyError, match="NOBODY"):
        source["NOBODY"]
    with pytest.raises(ModuleNotFoundError, match="hf_moe_cpt.nobody"):
        command_help("hf_moe_cpt.nobody", "test")
