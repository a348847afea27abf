"""YAML under the command line: who wins, and what is refused."""

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
import yaml

from hf_moe_cpt.arguments import parse_arguments, path_of_config


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
    "no YAML": ("a: [1\n", "is no YAML"),
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
