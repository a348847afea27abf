"""The script of preference optimisation: presets under files under the command line, one process and two, adapters."""

import json
from pathlib import Path

import pytest
from scipy import stats
from transformers import AutoModelForCausalLM

from hf_moe_cpt.scripts.rainbowpo import main
from hf_moe_cpt.trainers.rainbowpo.data import mixed
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import completions_logged
from tests.helpers.cpt_runs import saved_history, without_clocks
from tests.helpers.fresh_process import TWO_RANKS, command_words, launch
from tests.helpers.preference_runs import pairs, saved_model, trainer
from tests.helpers.tiny_models import QUICK


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs on disk and a saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs(16).to_json(folder / "pairs.jsonl")
    pairs(6, seed=3).to_json(folder / "held_out.jsonl")
    saved_model(folder)
    return folder


def _arguments(folder: Path, run: Path, **changes) -> list[str]:
    data = {"dataset_name": folder / "pairs.jsonl", "eval_dataset_name": folder / "held_out.jsonl"}
    pace = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    pace |= {"bf16": False, "gradient_checkpointing": False, "output_dir": run}
    settings = {"model_name_or_path": folder / "model llama", **data, **QUICK, **pace, **changes}
    return command_words(settings)


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The run in one process."""
    main(_arguments(folder, folder / "alone"))
    return folder / "alone"


def test_a_model_is_trained_evaluated_and_saved(alone):
    AutoModelForCausalLM.from_pretrained(alone)
    scale = json.loads((alone / "rainbowpo.json").read_text())["dispersion_scale"]
    assert f"Scale of phi: {scale:.4g}" in (alone / "README.md").read_text()
    metrics = json.loads((alone / "eval_results.json").read_text())
    assert {"eval_loss", "eval_rewards/accuracies", "eval_phi/mean"} <= metrics.keys()


@pytest.mark.slow
def test_two_processes_give_the_same_curve_as_one(alone, folder):
    launch(*TWO_RANKS, "scripts/rainbowpo.py", *_arguments(folder, folder / "two", per_device_train_batch_size=2))
    for one, two in zip(
        without_clocks(saved_history(alone)), without_clocks(saved_history(folder / "two")), strict=True
    ):
        assert two == pytest.approx(one, rel=2e-5, abs=2e-5)  # rewards are small differences of large numbers


@pytest.mark.slow
def test_command_line_over_file_over_preset(folder, capsys):
    recipe = folder / "recipe.yaml"
    recipe.write_text("preset: simpo\nsimpo_gamma: 1.0\nlink: hinge\n")
    main([*_arguments(folder, folder / "simpo", eval_dataset_name=None), "--config", str(recipe), "--link", "cauchy"])
    shown = capsys.readouterr().out
    assert "cauchy" in shown and "0.1" in shown
    assert not any("phi/mean" in entry for entry in saved_history(folder / "simpo"))
    assert json.loads((folder / "simpo" / "rainbowpo.json").read_text())["dispersion_scale"] is None
    card = (folder / "simpo" / "README.md").read_text()
    assert "simpo, but for link" in card and "Scale of phi" not in card


def test_an_adapter_is_trained(folder):
    changes = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
    main(_arguments(folder, folder / "adapter", eval_dataset_name=None, **changes))
    assert (folder / "adapter" / "adapter_config.json").is_file()


def test_sets_are_mixed_by_weight_and_no_pair_comes_twice():
    ours, theirs = pairs(400).add_column("source", [1] * 400), pairs(400, seed=1).add_column("place", [*range(400)])
    names = ["ours", "theirs"]
    found = mixed([ours.add_column("place", [*range(400, 800)]), theirs], names, [3, 1], seed=0)
    places = found["place"][:]
    assert len(set(places)) == len(found) and "source" not in found.column_names
    share = stats.binomtest(sum(place >= 400 for place in places), len(found), 0.75)
    assert share.pvalue > 1e-3 and max(places) == 799  # the heavier one is used up
    assert len(mixed([ours, ours], names, None, seed=0)) == 800
    with pytest.raises(ValueError, match="must be a number above 0 for each of ours, theirs"):
        mixed([ours, ours], names, [1.0], seed=0)
    with pytest.raises(ValueError, match="theirs and ours have columns of other types"):
        mixed([ours, ours.map(lambda row: {"chosen": [row["chosen"]]})], names, None, seed=0)


def test_answers_to_held_out_prompts_fill_trls_table(tmp_path):
    run = trainer(tmp_path, eval_dataset=pairs(6, seed=3), max_steps=2)
    table = completions_logged(run, 3)
    run.add_callback(table)
    run.train()
    assert [row[0] for row in table.table] == ["1"] * 3 + ["2"] * 3
    assert {row[1] for row in table.table} == set(pairs(6, seed=3)["prompt"][:3])
    run.eval_dataset = None
    with pytest.raises(ValueError, match="--log_completions answers held-out prompts"):
        completions_logged(run, 3)


REFUSED = [
    ({"preset": "kto"}, "'kto' is not a preset: it learns from single completions"),
    ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ({"dataset_name": "pears.jsonl"}, "the data set 'pears.jsonl' is no file or folder here: check the path"),
    ({"max_train_pairs": 0}, "max_train_pairs 0"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_wrong_requests_are_refused_before_anything_is_loaded(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(_arguments(folder, tmp_path / "run", **changes))
