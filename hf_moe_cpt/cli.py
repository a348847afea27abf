"""The command `hf-moe-cpt <command> ...`: finds the script of a command, hands it the rest of the line, prints errors.

Nothing heavy is imported before a command is known, so `--help` answers at once.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hf_moe_cpt import __version__
from hf_moe_cpt.extras import require


USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
HELP_WORDS = ("-h", "--help")
HELP_ALL_WORDS = ("--help_all", "--help-all")


@dataclass(frozen=True)
class Command:
    """A command's script (a module with `main(argv)`), the line that `--help` shows, and the extra it needs."""

    module: str
    summary: str
    package: str | None = None


COMMANDS = {
    "quickstart": Command(
        "hf_moe_cpt.scripts.quickstart",
        "teach, align, operate and publish one small model in minutes, and read what happened on a page",
    ),
    "cpt": Command("hf_moe_cpt.scripts.cpt", "continue pre-training any causal language model, with replay"),
    "rainbowpo": Command(
        "hf_moe_cpt.scripts.rainbowpo", "train on preference pairs, with RainbowPO or any method it contains", "trl"
    ),
    "rejection-sample": Command(
        "hf_moe_cpt.scripts.rejection_sample", "make preference pairs from a model's own answers and a reward model"
    ),
    "eval-preference": Command(
        "hf_moe_cpt.scripts.eval_preference", "win rate of a policy against a reference under a reward model"
    ),
    "iterate": Command(
        "hf_moe_cpt.scripts.iterate", "sample, score, pair, train and evaluate in rounds, as one resumable job", "trl"
    ),
    "surgery": Command(
        "hf_moe_cpt.scripts.surgery", "unlearn, update and retain in one operation, on any causal language model"
    ),
    "surgery-eval": Command(
        "hf_moe_cpt.scripts.eval_surgery", "what a surgery made a model forget, learn and keep, under attack too"
    ),
    "analyze": Command(
        "hf_moe_cpt.scripts.analyze", "compare how checkpoints of a mixture of experts route the same text"
    ),
    "upcycle": Command("hf_moe_cpt.scripts.upcycle", "make a mixture of experts out of a dense checkpoint"),
    "convert": Command(
        "hf_moe_cpt.scripts.convert", "write a mixture as Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE, or as cpt_moe"
    ),
    "push": Command("hf_moe_cpt.scripts.push", "check a finished folder and publish it on the Hub"),
    "card": Command("hf_moe_cpt.scripts.card", "write the model card of a finished run from its files"),
    "plan": Command("hf_moe_cpt.scripts.plan", "estimate memory, time and cost of a run before it is started"),
    "schedule": Command("hf_moe_cpt.scripts.schedule", "print and plot a learning-rate schedule before it is run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 done, 2 refused or stopped with a message, 130 interrupted, 141 whoever read the output stopped reading.

    argv: the words after the program's name; those of the process if None.
    """
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    if options.command not in COMMANDS:
        return _refuse(f"unknown command {options.command!r}: {_advice(options.command)}")
    return exit_code(lambda: _run(options.command, options.arguments), options.traceback)


def _run(name: str, words: Sequence[str]) -> None:
    command = COMMANDS[name]
    if any(word in HELP_WORDS for word in words):
        from hf_moe_cpt.command_help import command_help

        print(command_help(command.module, f"hf-moe-cpt {name}"))
        return
    if command.package is not None:
        require(command.package, needed_by=f"hf-moe-cpt {name}")
    importlib.import_module(command.module).main(words)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call the `main` of a script that was started by itself, and end the process with what `exit_code` says."""
    sys.exit(exit_code(main))


def run_program(programs: Mapping[str, Callable[[Sequence[str]], None]], argv: Sequence[str] | None) -> None:
    """Hand the words to the program that the first of them names, or to the first program if it is an option.

    argv: those of the process if None. Raises ValueError for an unknown name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else next(iter(programs))
    if name not in programs:
        raise ValueError(f"{name!r} is unknown: choose from {', '.join(programs)}.")
    programs[name](words)


def exit_code(call: Callable[[], None], with_traceback: bool = False) -> int:
    """Call, print what a user did wrong as one line, and return the exit code that `main` describes.

    with_traceback: raise such errors instead.
    """
    try:
        call()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if with_traceback:
            raise
        return _refuse(_one_line(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_refuse(f"{message}; hf-moe-cpt --help lists the commands."))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = _Parser(
        prog="hf-moe-cpt",
        description="Change a language model that you own, above all a mixture of experts, without breaking it.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n'hf-moe-cpt <command> --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf-moe-cpt {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised, not only its message"
    )
    parser.add_argument("command", metavar="<command>", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    return parser


def _advice(unknown: str) -> str:
    near = difflib.get_close_matches(unknown, COMMANDS, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(COMMANDS)}."


def _one_line(error: Exception) -> str:
    """The message as a single line, led by the kind of error unless it is a plain refusal of a value."""
    message = " ".join(str(error).split())
    if type(error) is ValueError and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
