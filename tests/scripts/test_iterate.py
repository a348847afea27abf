"""The loop on a tiny policy: two rounds, killed after every stage and gone on with, are those of an undisturbed run;
rewards in Python are called as TRL calls its own."""

import json
import sys
from pathlib import Path

import pytest

from hf_moe_cpt import rounds
from hf_moe_cpt.generation.pairs import load_table
from hf_moe_cpt.generation.sampling import RewardFunction
from hf_moe_cpt.scripts.iterate import main
from tests.helpers.fresh_process import command_words
from tests.helpers.tiny_models import tiny_model, word_tokenizer


VERIFIER = "def variety(prompts, completions):\n    return [len(set(text.split())) for text in completions]\n"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A policy, prompts, and a verifier that counts different words."""
    folder = tmp_path_factory.mktemp("material")
    policy = tiny_model("llama")
    policy.lm_head.weight.data *= 30
    policy.save_pretrained(folder / "policy")
    word_tokenizer().save_pretrained(folder / "policy")
    rows = [json.dumps({"prompt": f"w{number} w{number + 1}"}) for number in range(2, 10)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "verifier.py").write_text(VERIFIER)
    return folder


def arguments(material: Path, run: Path, **changes: object) -> list[str]:
    """The command line of two rounds of four prompts each."""
    prompts = str(material / "prompts.jsonl")
    sample = {"dataset_name": prompts, "reward_function": f"{material / 'verifier.py'}:variety", "num_samples": 4}
    sample |= {"num_accepted": 3, "rewards": "percentile", "max_new_tokens": 6, "device": "cpu"}
    train = {
        "preset": "ln-dpo",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "bf16": False,
    }
    train |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    told = {"sample": sample, "train": train, "evaluate": {"prompts": prompts}} | changes
    told = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in told.items()}
    start = {"model_name_or_path": material / "policy", "output_dir": run, "rounds": 2, "prompts_per_round": 4}
    return command_words(start | told)


@pytest.mark.slow
def test_rounds_killed_after_every_stage_are_those_of_an_undisturbed_run(material, tmp_path, monkeypatch):
    main(arguments(material, tmp_path / "alone"))
    carry_out = rounds._carry_out

    def killed_after(*words: object) -> None:
        carry_out(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "_carry_out", killed_after)
    for _ in range(6):  # three stages of each round
        with pytest.raises(KeyboardInterrupt):
            main(arguments(material, tmp_path / "killed"))
    monkeypatch.undo()
    main(arguments(material, tmp_path / "killed"))
    for number in (1, 2):
        folders = [tmp_path / run / f"round-{number}/pairs/data" for run in ("alone", "killed")]
        pairs = [load_table(str(folder)).to_list() for folder in folders]
        assert pairs[0] == pairs[1] != []
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("alone", "killed")]
    assert reports[0] == reports[1] and [row["round"] for row in reports[0]["rounds"]] == [1, 2]
    first, second = reports[0]["rounds"]
    assert first["divergence"] != second["divergence"] and first["reward"] is not None


REFUSED = {
    "told by the loop": ({"train": {"output_dir": "x"}}, "--train: output_dir is what the loop decides"),
    "an adapter": ({"train": {"use_peft": True, "bf16": False}}, "--train: use_peft leaves an adapter"),
    "nothing": ({"sample": "null"}, "'null' is neither a JSON object nor a YAML file"),
    "a key twice": (
        {"train": '{"learning_rate": 1, "learning_rate": 2}'},
        "--train .* 'learning_rate' is given twice",
    ),
    "no object": ({"evaluate": "[1]"}, "neither a JSON object nor a YAML file"),
    "refused by a stage": ({"train": {"beta": -1.0}}, "beta=-1.0 must be a finite number above 0"),
    "no scorer": ({"sample": {"dataset_name": "x"}}, "Give one of --reward_model_name_or_path"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_a_stage_would_refuse_is_refused_before_the_first(changes, message, material, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(arguments(material, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_verifier_is_called_as_trl_calls_reward_functions(material, tmp_path):
    trl = RewardFunction("trl.rewards:think_format_reward", 1)
    chat = [{"role": "user", "content": "w2"}]
    told = trl.load()([(chat, "<think>\na\n</think>\nb"), (chat, "b")])
    assert [score.reward for score in told] == [1.0, 0.0]
    own = RewardFunction(f"{material / 'verifier.py'}:variety", 2)
    assert [score.reward for score in own([("w2", "a b a"), ("w2", ""), ("w3", "a")])] == [2.0, 0.0, 1.0]
    (tmp_path / "wrong.py").write_text("def nan(prompts, completions):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(ValueError, match="gives nan for the response 'a'"):
        RewardFunction(f"{tmp_path / 'wrong.py'}:nan", 1)([("w2", "a")])
    for place, message in (("math:nothing", "has no function 'nothing'"), ("no_such_module:f", "cannot be imported")):
        with pytest.raises(ValueError, match=message):
            RewardFunction(place, 1)
    assert "no_such_module" not in sys.modules
