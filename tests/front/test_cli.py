"""The command: what it lists, what it forwards, and how it reports."""

import shlex
import subprocess
import sys
from types import ModuleType

import pytest

import hf_moe_cpt
from hf_moe_cpt import cli
from hf_moe_cpt.data.text import UnreadFileError
from tests.helpers.fresh_process import run_python
from tests.helpers.source_tree import PROJECT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command `job` whose `main` the test sets."""
    module = ModuleType("script_of_job")
    monkeypatch.setitem(sys.modules, "script_of_job", module)
    monkeypatch.setitem(cli.COMMANDS, "job", cli.Command("script_of_job", "a job"))
    return module


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name, command in cli.COMMANDS.items():
        assert [name, command.summary] in lines


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hf-moe-cpt {hf_moe_cpt.__version__}\n"


def test_words_after_the_command_reach_the_script(script: ModuleType) -> None:
    received = []
    script.main = received.extend
    assert cli.main(["job", "--traceback", "x", "--", "y"]) == 0
    assert received == ["--traceback", "x", "--", "y"]


@pytest.mark.parametrize(
    "word, advice", [("quickstrat", "did you mean quickstart?"), ("zzz", "choose from quickstart, cpt, tokenize,")]
)
def test_unknown_command_suggests_near_ones(word: str, advice: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([word]) == 2
    assert f"error: unknown command {word!r}: {advice}" in capsys.readouterr().err


def test_a_line_without_a_command_is_refused_with_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--bogus"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ")
    assert said.index("\n") == len(said) - 1 and said.endswith("hf-moe-cpt --help lists the commands.\n")


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("replay_ratio is 1.5:\n  give one below 1."), "error: replay_ratio is 1.5: give one below 1.\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), "error: FileNotFoundError: [Errno 2] No such file: 'a.txt'\n"),
        (ImportError("needs trl"), "error: ImportError: needs trl\n"),
        (ValueError(), "error: ValueError\n"),
        (UnreadFileError("a.txt is empty: remove it.", "empty"), "error: a.txt is empty: remove it.\n"),
    ],
)
def test_errors_of_the_user_are_one_line(
    error: Exception, line: str, script: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    script.main = fail
    assert cli.main(["job"]) == 2
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)):
        cli.main(["--traceback", "job"])


def test_errors_of_ours_keep_their_traceback(script: ModuleType) -> None:
    def fail(argv: list[str]) -> None:
        raise RuntimeError("a bug")

    script.main = fail
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["job"])


def test_interrupt_has_its_exit_code(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    script.main = interrupt
    assert cli.main(["job"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_reader_that_has_enough_sees_no_complaint() -> None:
    program = f"{shlex.quote(sys.executable)} -m hf_moe_cpt.cli plan --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_the_package_is_the_command() -> None:
    assert run_python("-m", "hf_moe_cpt", "--version").stdout == f"hf-moe-cpt {hf_moe_cpt.__version__}\n"
