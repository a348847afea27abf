"""The command line of every command and script: dataclasses of settings, and a YAML file given with `--config`.

The command line wins over the file, the file over the defaults of the dataclasses. `--help` is of
`hf_moe_cpt.cli`. Source: ours, on transformers' HfArgumentParser.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.cli import HELP_ALL_WORDS, HELP_WORDS, USER_ERROR, format_help
from hf_moe_cpt.modeling.configuration_cpt_moe import PADDED_SHARD
from hf_moe_cpt.reading import reading, unique_keys
from hf_moe_cpt.settings import check_values, wants_list


RECIPE_PREFIX = "recipe:"
NEEDED_FOR_EP = "5.23"  # the first with `EPImplementationInterface`
EXPONENT_WITHOUT_DOT = re.compile(r"^[+-]?\d+[eE][+-]?\d+$")


class SettingsParser(HfArgumentParser):
    """Options of dataclasses, each as --with_underscores and --with-dashes; one line and exit code 2 for an error.

    A field whose metadata has `positional` is a word without a name.
    """

    def __init__(self, kinds: Sequence[type], program: str) -> None:
        super().__init__(list(kinds), prog=program, add_help=False, allow_abbrev=False, conflict_handler="resolve")
        self.add_argument("--config")
        self._own = {action.dest: (action, action.default) for action in self._actions}

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if "positional" in field.metadata:
            parser.add_argument(field.name)
        else:
            field = copy.copy(field)  # what is left of its metadata becomes arguments of argparse
            field.metadata = {name: value for name, value in field.metadata.items() if name != "range"}
            HfArgumentParser._parse_dataclass_field(parser, field)

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Take other defaults; what has one need not be given, and one value stands for a list of it.

        Mappings in a list become JSON, which is how the command line writes them.
        """
        lists = {
            field.name
            for kind in self.dataclass_types
            for field in dataclasses.fields(kind)
            if wants_list(kind, field.name)
        }
        values = {
            name: [value] if name in lists and isinstance(value, str) else value for name, value in values.items()
        }
        for name in lists & {name for name, value in values.items() if isinstance(value, list)}:
            values[name] = [json.dumps(item) if isinstance(item, dict) else item for item in values[name]]
        self.set_defaults(**values)
        for action in self._actions:
            if values.get(action.dest) is not None:
                action.required = False
                action.nargs = action.nargs if action.option_strings else "?"

    def parse(self, words: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled; an option that nobody has is told with those whose names are near."""
        for word in words[: words.index("--")] if "--" in words else words:
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                self._refuse_unknown(word.partition("=")[0])
        _, left = self.parse_known_args(words)
        if left:
            self.error(f"{left[0]!r} belongs to no option: {self.prog} --help lists them.")
        given, parsed = vars(self.parse_args(words)), []
        for kind in self.dataclass_types:
            values = {field.name: given[field.name] for field in dataclasses.fields(kind) if field.init}
            check_values(kind, {name: value for name, value in values.items() if self._is_given(name, value)})
            with reading(f"a setting of {self.prog}", "mend what is named", keeps=(ValueError, OSError)):
                parsed.append(kind(**values))
        return tuple(parsed)

    def _is_given(self, name: str, value: Any) -> bool:
        """Whether a value is not the default of its field, as argparse makes it of that."""
        action, own = self._own[name]
        return value is not own and not (isinstance(own, str) and value == self._get_value(action, own))

    def _refuse_unknown(self, option: str) -> None:
        known = [name for name in self._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        near = difflib.get_close_matches(f"--{option[2:].replace('-', '_')}", known)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"{self.prog} --help lists the options."
        self.error(f"{option} is no option of {self.prog}: {remedy}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{str(value)!r} is unknown: choose from {allowed}.")

    def error(self, message: str) -> NoReturn:
        """Say it in one line, with one spelling of an option, and end the process with exit code 2."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", " ".join(message.split())).removeprefix("argument ")
        message = re.sub(r"^(--\w+): invalid (\w+) value: (.*)", r"\1 \3 is no \2.", message)
        message = re.sub(r"^(--\w+): (?=')", r"\1 ", message)
        if (missing := message.removeprefix("the following arguments are required: ")) != message:
            first = missing.partition(", ")[0]
            first = first if first.startswith("--") else first.upper()
            message = f"{first} is missing: give it, {self.prog} --help says what it is."
        self.exit(USER_ERROR, f"error: {message}\n")


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None,
    *,
    program: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass, filled from `argv` (of the process if None) over the file of `--config`.

    defaults: other defaults than the dataclasses'; file and command line win over them. Ends the process for `--help`
    (code 0) and for words that no option takes (code 2). Raises ValueError for a file that cannot be read, for keys in
    it that no argument has, and for what the dataclasses refuse.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if asked := next((word for word in words if word in (*HELP_WORDS, *HELP_ALL_WORDS)), None):
        print(format_help(program, description, dataclass_types, everything=asked in HELP_ALL_WORDS))
        sys.exit(0)
    parser = SettingsParser(dataclass_types, program)
    parser.set_values(defaults or {})
    path = _given(words, "config").config
    if path is not None:
        known = {option.name for kind in dataclass_types for option in dataclasses.fields(kind) if option.init}
        parser.set_values(read_config(path, known))
    return parser.parse(words)


class UniqueKeys(yaml.SafeLoader):
    """YAML without objects, in which no key may be given twice: the last would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent's. Raises ConstructorError for a key that is there twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, known: set[str]) -> dict[str, Any]:
    """The mapping in a YAML file, whose keys must all be in `known`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config {str(path)!r} cannot be read: {error.strerror}.") from error
    with reading(f"--config {str(path)!r}", "write it anew, as `argument: value` lines"):
        values = yaml.load(text, UniqueKeys)
    if not isinstance(values, dict):
        raise ValueError(f"--config {str(path)!r} must hold `argument: value` lines, got {type(values).__name__}.")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "see --help for the arguments."
            raise ValueError(f"--config {str(path)!r} sets {key!r}, which is no argument: {remedy}")
    return {key: _plain_number(value) for key, value in values.items()}


def _plain_number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text because it has no dot; people write it everywhere."""
    return float(value) if isinstance(value, str) and EXPONENT_WITHOUT_DOT.match(value) else value


def given_values(argv: Sequence[str] | None, *names: str) -> dict[str, Any]:
    """What command line or file say of some arguments, before everything is parsed; None for what neither names.

    Values of the command line are text.
    """
    found = _given(argv, "config", *names)
    try:
        text = "" if found.config is None else Path(found.config).read_text(encoding="utf-8")
        of_file = yaml.load(text, UniqueKeys)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        of_file = None  # `parse_arguments` says what is wrong with it
    of_file = of_file if isinstance(of_file, dict) else {}
    typed = {name: getattr(found, name) for name in names}
    return {name: of_file.get(name) if value is None else value for name, value in typed.items()}


def _given(argv: Sequence[str] | None, *names: str) -> argparse.Namespace:
    """Text of `config` and other arguments on the command line; a recipe's name has become its path."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        finder.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
    found = finder.parse_known_args(None if argv is None else list(argv))[0]
    if found.config is not None:
        found.config = path_of_config(found.config)
    return found


def path_of_config(config: str) -> str:
    """The file that `--config` names: that of a recipe for `recipe:surgery_safe`, else the path that was given.

    Raises ValueError for a recipe that does not exist, with the names of those that do.
    """
    if not config.startswith(RECIPE_PREFIX):
        return config
    name = config.removeprefix(RECIPE_PREFIX).removesuffix(".yaml")
    recipes = {path.stem: path for path in Path(str(files("hf_moe_cpt.scripts"))).glob("recipes/*.yaml")}
    if name not in recipes:
        raise ValueError(f"--config {config!r}: no recipe has this name, choose from {', '.join(sorted(recipes))}.")
    return str(recipes[name])


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The object in `text`, an empty one for None. Raises ValueError, naming the option, for anything else."""
    try:
        values = json.loads(text or "{}", object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {(text or '')[:200]!r} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option} {text!r} must be a JSON object of name: value.")
    return values


@dataclass
class ParallelArguments:
    """How a model is dealt to the ranks that were started; with none of these, accelerate decides."""

    ep_size: int | None = HfArg(default=None, help="Expert parallelism: experts are dealt to so many ranks.")
    tp_size: int | None = HfArg(default=None, help="Tensor parallelism: so many ranks share matrices and rows.")
    dp_replicate_size: int | None = HfArg(
        default=None, help="Copies of the model, for several machines; each is sharded."
    )
    gather_dtype: str = HfArg(
        default="auto",
        metadata={"choices": ["auto", "float32"]},
        help="float32: gathered weights are rounded no more than on one device, for twice the bytes.",
    )


def fsdp2_arguments(layer_class: str, **more: Any) -> dict[str, Any]:
    """Fields of `TrainingArguments` that shard a model by FSDP2, layer by layer; `more` goes into `fsdp_config`."""
    wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [layer_class]}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrapped, **more}}


def parallel_options(
    args: ParallelArguments, training: TrainingArguments, num_ranks: int | None = None
) -> dict[str, Any]:
    """The argument of `from_pretrained` that deals a model to all ranks; empty where nothing is asked for.

    Ranks that neither tensors nor copies take share the model by FSDP2, which is data parallelism. num_ranks: those
    that were started if None. Raises ValueError for sizes that do not fit them, for two engines at once, and for
    checkpoints that cannot be written.
    """
    sizes = {name: value for name, value in vars(args).items() if value is not None and name != "gather_dtype"}
    is_short = training.bf16 and args.gather_dtype != "float32"
    if not sizes:
        if args.gather_dtype != "auto":
            raise ValueError("--gather_dtype float32 with no model dealt to ranks: add --dp_replicate_size 1.")
        return {}
    asked = ", ".join(f"--{name} {value}" for name, value in sizes.items())
    num_ranks = training.world_size if num_ranks is None else num_ranks
    taken = sizes.get("tp_size", 1) * sizes.get("dp_replicate_size", 1)
    if min(sizes.values()) < 1 or num_ranks % taken:
        raise ValueError(f"{asked} does not fit {num_ranks} rank(s): their product must divide the number of ranks.")
    if training.fsdp or training.deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(f"{asked} and FSDP or DeepSpeed both shard the model: start with scripts/accelerate/ep.yaml.")
    return {"distributed_config": _distributed_config(sizes, num_ranks // taken, asked, is_short)}


def _distributed_config(sizes: dict[str, int], fsdp_size: int, asked: str, bf16: bool) -> Any:
    """Weights are gathered in bfloat16 where products run in it, and experts reached by our exchange."""
    from transformers.distributed import DistributedConfig

    known = inspect.signature(DistributedConfig).parameters
    needed = [*sizes, *(["ep_implementation"] if "ep_size" in sizes else [])]
    if not all(name in known for name in needed):
        raise ValueError(
            f"{asked} needs transformers {NEEDED_FOR_EP} or newer and this is {transformers.__version__}: "
            f"pip install 'transformers>={NEEDED_FOR_EP}'."
        )
    precision = {"fsdp_mixed_precision": bf16} if "fsdp_mixed_precision" in known else {}
    if "ep_size" in sizes:
        sizes = {**sizes, "ep_implementation": "hf_moe_cpt"}
        _pad_experts_of_any_model()
    try:
        return DistributedConfig(fsdp_size=fsdp_size, **precision, **sizes)
    except ValueError as error:
        raise ValueError(f"{asked} on {fsdp_size} data parallel rank(s): {error}") from error


def _pad_experts_of_any_model() -> None:
    """Deal experts whose number ep_size does not divide, also of models whose plan has transformers' own style."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    from hf_moe_cpt.modeling.modeling_cpt_moe import register_padded_shard

    register_padded_shard()
    ALL_PARALLEL_STYLES.register("grouped_gemm", ALL_PARALLEL_STYLES[PADDED_SHARD])
