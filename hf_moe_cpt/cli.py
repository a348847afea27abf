"""The command `hf-moe-cpt <command> ...`: finds the script of a command, hands it the rest of the line, prints errors.

Nothing heavy is imported for `--help`, which is read from the source of the settings: a script names these in a tuple
ARGUMENTS, and `SourceModule` runs only the statements that they need. What other packages define is a placeholder,
so that of a subclass of TrainingArguments our own fields remain, which are what `--help` is about; `--help_all` prints
the fields of other packages too, and so imports them. Source: ours.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import builtins
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hf_moe_cpt
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
    "tokenize": Command(
        "hf_moe_cpt.scripts.continual.tokenize_text",
        "tokenise the text of a run once, for all ranks and nodes",
    ),
    "rewarm": Command(
        "hf_moe_cpt.scripts.continual.rewarm",
        "try a few learning rates: adaptation against forgetting",
    ),
    "merge": Command(
        "hf_moe_cpt.scripts.continual.merge", "average the weights of several checkpoints or adapters of one model"
    ),
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
    """The message as a single line, led by the kind of error unless it is a refusal of ours."""
    message, kind = " ".join(str(error).split()), type(error)
    if message and (kind is ValueError or kind.__module__.startswith(f"{__package__}.")):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


FOREIGN = ("transformers", "trl")  # owners of base classes whose fields are on --help_all only
MOST_USED = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps")
CONFIG_HELP = "YAML file with arguments, or recipe:NAME; the command line wins over it"
_TOPIC = re.compile(r"\s*# --- ([^:]+?)(?::.*)? ---$")
_FIELD = re.compile(r"    (\w+): ")
_NAME_COLUMNS, _MOST_COLUMNS = 34, 112


class Absent:
    """Stands for something of another package: whatever is done with it gives the same, and it holds nothing."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        return (type(self._name, (), {"__module__": self._module}),)

    def __call__(self, *args: Any, **kwargs: Any) -> Absent:
        return self

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __iter__(self) -> Iterator:
        return iter(())


def hf_arg(help: str | None = None, metadata: dict[str, Any] | None = None, **options: Any) -> dataclasses.Field:
    """What `transformers.hf_argparser.HfArg` makes of the same arguments, without importing it."""
    return dataclasses.field(metadata=(metadata or {}) | {"help": help}, **options)


class SourceModule(dict):
    """The names of one of our modules, read from its file: a statement runs when a name that it binds is asked for.

    name: as for an import. A class keeps the text that defines it in `_source`. KeyError for a name that is not there.
    """

    _loaded: dict[str, SourceModule] = {}

    def __init__(self, name: str) -> None:
        self.name, self.path = name, _file_of(name)
        super().__init__(__name__=__name__, __file__=str(self.path), __builtins__=builtins)
        self.text = self.path.read_text(encoding="utf-8")
        tree = ast.parse(self.text)
        self["__doc__"] = ast.get_docstring(tree)
        self._statements = {bound: node for node in tree.body for bound in _bound_names(node)}

    @classmethod
    def load(cls, name: str) -> SourceModule:
        """The module, read once in a process."""
        if name not in cls._loaded:
            cls._loaded[name] = cls(name)
        return cls._loaded[name]

    def __missing__(self, name: str) -> Any:
        node = self._statements[name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            self[name] = self._imported(node, name)
            return self[name]
        for used in _names_used_at_once(node):  # the body of a class looks past __missing__
            if used != name and used in self._statements:
                self[used]
        flags = __future__.annotations.compiler_flag
        exec(compile(ast.Module([node], []), str(self.path), "exec", flags, dont_inherit=True), self)
        if isinstance(node, ast.ClassDef) and isinstance(self[name], type):
            self[name]._source = ast.get_source_segment(self.text, node)
        return self[name]

    def _imported(self, node: ast.Import | ast.ImportFrom, name: str) -> Any:
        alias = next(alias for alias in node.names if _binding(alias) == name)
        if isinstance(node, ast.Import):
            module, member = alias.name if alias.asname else name, None
        else:
            parents = self.name.split(".")[: -node.level] if node.level else []
            module, member = ".".join([*parents, *filter(None, [node.module])]), alias.name
        root = module.partition(".")[0]
        if root in sys.stdlib_module_names or root == "yaml":  # the file of presets
            found = importlib.import_module(module)
            return found if member is None else getattr(found, member)
        if root == hf_moe_cpt.__name__ and member is not None:
            source = SourceModule.load(module)
            if member in source._statements or source.path.name != "__init__.py":  # else maybe a file of a package
                return source[member]
        return hf_arg if member == "HfArg" else Absent(module, member or name)


def _file_of(module: str) -> Path:
    """Where one of our modules lies. Raises ModuleNotFoundError."""
    below = Path(*module.split(".")[1:])
    for root in map(Path, hf_moe_cpt.__path__):
        for path in (root / below / "__init__.py", (root / below).with_suffix(".py")):
            if path.is_file():
                return path
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _binding(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _bound_names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds; none for what is neither definition, assignment nor import."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [_binding(alias) for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _names_used_at_once(node: ast.AST) -> Iterator[str]:
    """Names that run with a statement: not the bodies of functions, not annotations."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load):
            yield node.id
    elif isinstance(node, ast.FunctionDef | ast.Lambda):
        for decorator in getattr(node, "decorator_list", []):
            yield from _names_used_at_once(decorator)
    else:
        for role, child in ast.iter_fields(node):
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST) and role != "annotation":
                    yield from _names_used_at_once(part)


def command_help(module: str, program: str) -> str:
    """The help of a command, from the source of its script alone."""
    source = SourceModule.load(module)
    return format_help(program, source["__doc__"], source["ARGUMENTS"])


def format_help(program: str, description: str, kinds: Sequence[type], everything: bool = False) -> str:
    """The text of `--help`: usage, what the command does, options grouped by topic.

    kinds: dataclasses, real ones or of a `SourceModule`, with the same text for both. everything: also the fields that
    they inherit from other packages, which only real ones have.
    """
    width = min(shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns - 1, _MOST_COLUMNS)
    fields = [field for kind in kinds for field in dataclasses.fields(kind) if field.init]
    needed = [_usage(field) for field in fields if _is_required(field) and "positional" in field.metadata]
    needed += [_usage(field) for field in fields if _is_required(field) and "positional" not in field.metadata]
    usage = " ".join(["usage:", program, *needed, "[--config FILE]", "[--option VALUE ...]"])
    parts = [textwrap.fill(usage, width, subsequent_indent="    "), inspect.cleandoc(description)]
    for kind in kinds:
        for owner, topic, members in _groups(kind):
            if everything or not _is_foreign(owner):
                lines = [line for field in members for line in _option_lines(field, width)]
                parts.append("\n".join([textwrap.fill(f"{topic[0].upper()}{topic[1:]}:", width), *lines]))
    parts.append("\n".join(["General:", *_general_lines(kinds, width)]))
    return "\n\n".join(filter(None, parts))


def _general_lines(kinds: Sequence[type], width: int) -> list[str]:
    """What every command takes."""
    lines = [*_lines("--config FILE", f"{CONFIG_HELP}.", width), *_lines("-h, --help", "This text.", width)]
    bases = dict.fromkeys(name for kind in kinds for name in _foreign_bases(kind))
    if bases:
        owners = [owner for kind in kinds for owner in kind.__mro__ if not _is_foreign(owner)]
        ours = {name for owner in owners for name in inspect.get_annotations(owner)}
        used = ", ".join(f"--{name}" for name in MOST_USED if name not in ours)
        text = f"Also the options of {' and '.join(bases)}, which are taken as well"
        lines += _lines("--help_all", f"{text}, such as {used}.", width)
    return lines


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def _foreign_bases(kind: type) -> list[str]:
    """Names of the classes of other packages that ours are made from."""
    bases = [base for owner in kind.__mro__ if not _is_foreign(owner) for base in owner.__bases__]
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in bases if _is_foreign(base)]


def _groups(kind: type) -> Iterator[tuple[type, str, list[dataclasses.Field]]]:
    """(owner, topic, fields) in the order of the classes that declare them; topics are `# --- ... ---` comments."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for owner in kind.__mro__:
        declared = [name for name in inspect.get_annotations(owner) if name in fields]
        topics = {} if _is_foreign(owner) else _topics(owner, declared)
        title = _title(owner)
        for topic in dict.fromkeys(topics.get(name, title) for name in declared):
            yield owner, topic, [fields.pop(name) for name in declared if topics.get(name, title) == topic]


def _title(owner: type) -> str:
    if _is_foreign(owner):
        return f"{owner.__module__.partition('.')[0]}.{owner.__name__}"
    return (inspect.getdoc(owner) or owner.__name__).split("\n\n")[0].split("\n")[0].rstrip(".")


def _topics(owner: type, names: Iterable[str]) -> dict[str, str]:
    """Topic by field, for those below a comment `# --- topic: remark ---`."""
    if not names:
        return {}
    found, topic = {}, None
    for line in (vars(owner).get("_source") or inspect.getsource(owner)).splitlines():
        if heading := _TOPIC.match(line):
            topic = heading[1]
        elif topic is not None and (declared := _FIELD.match(line)):
            found[declared[1]] = topic
    return found


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _usage(field: dataclasses.Field) -> str:
    return field.name.upper() if "positional" in field.metadata else f"--{field.name} {field.name.upper()}"


def _option_lines(field: dataclasses.Field, width: int) -> list[str]:
    """Name, help, choices and default of one option."""
    text = field.metadata.get("help", "").replace("%%", "%")
    choices = [str(choice) for choice in field.metadata.get("choices") or ()]
    if any(choice not in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if _is_required(field):
        text += " (needed)"
    elif default not in (None, "", []):
        values = default if isinstance(default, list | tuple) else [getattr(default, "value", default)]
        text += f" (default: {' '.join(map(str, values))})"
    name = field.name.upper() if "positional" in field.metadata else f"--{field.name}"
    return _lines(name, " ".join(text.split()), width)


def _lines(name: str, text: str, width: int) -> list[str]:
    indent = " " * _NAME_COLUMNS
    first = f"  {name:<{_NAME_COLUMNS - 4}}  "
    is_long = len(first) > _NAME_COLUMNS
    start = indent if is_long else first
    lines = textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
    return [first.rstrip(), *lines] if is_long or not lines else lines


if __name__ == "__main__":
    sys.exit(main())
