"""No option of a trainer's command is taken and ignored: ours are read, those of a parent are read or refused."""

import ast
import dataclasses
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainingArguments

from hf_moe_cpt.scripts import cpt, rainbowpo, surgery
from hf_moe_cpt.trainers.common.arguments import FLAGS_OF_SCRIPTS, OPTIONS_OF_EPOCHS
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import OPTIONS_OF_DPO
from tests.helpers.source_tree import PROJECT


COMMANDS = {"cpt": cpt, "rainbowpo": rainbowpo, "surgery": surgery}
ROOMS = ("hf_moe_cpt", "modeling", "scripts", "trainers")
REFUSED = {
    "cpt": [*FLAGS_OF_SCRIPTS, *OPTIONS_OF_EPOCHS, "lr_scheduler_kwargs"],
    "rainbowpo": [*FLAGS_OF_SCRIPTS, *OPTIONS_OF_DPO],
    "surgery": [*FLAGS_OF_SCRIPTS, *OPTIONS_OF_EPOCHS],
}
OF_LAUNCHERS = "local_rank"  # old launchers give it beside the environment that torch reads
OTHER_VALUE = {bool: True, str: "words", float: 7.0, int: 7, dict: {"power": 2}}


def _reads() -> Counter:
    """How often each name is read as an attribute, or spelt in a string, in the code of this project."""
    found: Counter = Counter()
    for room in ROOMS:
        for path in (PROJECT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found[node.attr] += 1
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(set(re.findall(r"\w+", node.value)) if " " not in node.value else ())
    return found


def _is_read(name: str, reads: Counter) -> bool:
    """Whether code reads the name, or the end of it behind a name that it fills in, as in f"{name}_weight"."""
    return any(reads[name[place:]] for place in range(len(name)) if place == 0 or name[place] == "_")


@pytest.fixture(scope="module")
def reads() -> Counter:
    return _reads()


def test_every_option_of_ours_is_read(reads, reads_of_parents):
    declared = {
        f"{owner.__name__}.{name}"
        for module in COMMANDS.values()
        for kind in module.ARGUMENTS
        for owner in kind.__mro__
        if owner.__module__.startswith("hf_moe_cpt")
        for name in inspect.get_annotations(owner)
        if name in {field.name for field in dataclasses.fields(kind)}
    }
    assert len(declared) > 100
    unread = [name for name in sorted(declared) if not _is_read(name.partition(".")[2], reads)]
    assert [name for name in unread if name.partition(".")[2] not in reads_of_parents] == []
    assert not _is_read("an_option_that_nobody_reads", reads)


@pytest.fixture(scope="module")
def reads_of_parents() -> set[str]:
    """What transformers and TRL read of their arguments."""
    files = {transformers: ("*.py", "integrations/*.py", "distributed/*.py"), trl: ("trainer/*.py",)}
    paths = [path for package, patterns in files.items() for pattern in patterns for path in _files(package, pattern)]
    text = "\n".join(path.read_text() for path in paths)
    return set(re.findall(r"(?:(?<=args)|(?<=self))(?:\.|, [\"'])(\w+)", text))


def _files(package, pattern: str):
    return Path(package.__file__).parent.glob(pattern)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_parent_is_read_by_it_or_refused(command, reads, reads_of_parents):
    names = [field.name for field in dataclasses.fields(COMMANDS[command].ARGUMENTS[2]) if field.init]
    unread = [name for name in names if name not in reads_of_parents and not _is_read(name, reads)]
    assert [name for name in unread if name not in (*REFUSED[command], OF_LAUNCHERS)] == []


@pytest.mark.parametrize("command, name", [(command, name) for command, names in REFUSED.items() for name in names])
def test_what_nothing_reads_is_refused(tmp_path, command, name):
    settings = COMMANDS[command].ARGUMENTS[2]
    fields = {field.name: field for kind in (settings, TrainingArguments) for field in dataclasses.fields(kind)}
    default = fields[name].default
    default = fields[name].default_factory() if default is dataclasses.MISSING else default
    by_name = {"train_sampling_strategy": "group_by_length", "lr_scheduler_kwargs": {"power": 2}, "ld_alpha": 0.5}
    value = by_name.get(name, OTHER_VALUE.get(type(default), 7))
    with pytest.raises(ValueError, match=rf"^{name}=.* is not part of this \w+: .+\.$"):
        settings(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, **{name: value})
