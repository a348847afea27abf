"""The evaluation of a policy on tiny models: its numbers against models and TRL, lost shards, refusals."""

import csv
import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hf_moe_cpt.evaluation import preference
from hf_moe_cpt.evaluation.preference import is_readable, read_pairs, tokenize_answers
from hf_moe_cpt.evaluation.statistics import length_controlled_share, preference_accuracy, wilson_interval
from hf_moe_cpt.generation import sampling
from hf_moe_cpt.scripts.eval_preference import main
from tests.helpers.fresh_process import command_words
from tests.helpers.tiny_models import EOS, SIZES, tiny_model, word_tokenizer


PROMPTS = [" ".join(f"w{2 + (i * step) % 40}" for step in range(1, 2 + i % 4)) for i in range(14)]
NUM_PAIRS = 9


def _answer(number: int) -> str:
    return " ".join(f"w{2 + (number * 7 + step) % 40}" for step in range(1 + number % 5))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two policies that end some of their responses, two reward models, prompts, and pairs of text and of messages."""
    folder = tmp_path_factory.mktemp("world")
    for name, kind in {"policy": "llama", "start": "mixtral"}.items():
        model = tiny_model(kind)
        model.get_output_embeddings().weight.data *= 30
        model.generation_config.eos_token_id = [EOS, *range(2, 8)]
        model.save_pretrained(folder / name)
    for name, num_labels in {"reward": 1, "three labels": 3}.items():
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "pad_token_id": 1}, num_labels=num_labels))
        model.score.weight.data *= 50
        model.save_pretrained(folder / name)
    tokenizer = word_tokenizer()
    for name in ("policy", "start"):
        tokenizer.save_pretrained(folder / name)
    tokenizer.chat_template = None
    for name in ("reward", "three labels"):
        tokenizer.save_pretrained(folder / name)
    texts = [
        {"prompt": PROMPTS[i] + " ", "chosen": _answer(i), "rejected": _answer(3 * i + 1)} for i in range(NUM_PAIRS)
    ]
    chats = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in texts
    ]
    for name, rows in {"prompts": [{"prompt": text} for text in PROMPTS], "pairs": texts, "chats": chats}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _arguments(world: Path, run: Path, **changes: object) -> list[str]:
    models = {"policy": "model", "start": "ref_model", "reward": "reward_model"}
    settings = {f"{option}_name_or_path": world / name for name, option in models.items()}
    settings |= {"prompts": world / "prompts.jsonl", "dataset_name": world / "pairs.jsonl", "output_dir": run}
    settings |= {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 4, "shard_size": 5, "device": "cpu"}
    return command_words({**settings, "commit": "abc1234", **changes})


def _measures(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "summary.json").read_text())["measures"]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> tuple[Path, str]:
    """The run that nobody disturbed, and what it printed."""
    run, printed = tmp_path_factory.mktemp("alone") / "run", io.StringIO()
    with redirect_stdout(printed):
        main(_arguments(world, run))
    return run, printed.getvalue()


def test_rewards_are_the_reward_models_and_the_counts_are_theirs(alone, world):
    rows = read_lines(alone[0] / "judged.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(world / "reward")
    model = LlamaForSequenceClassification.from_pretrained(world / "reward").eval()
    wins = ties = 0
    for row in rows:
        for response, reward in (("response", "reward"), ("ref_response", "ref_reward")):
            inputs = tokenizer(f"{row['prompt']}{row[response]}</s>", return_tensors="pt")
            with torch.no_grad():
                want = model(input_ids=inputs["input_ids"]).logits.item()
            assert row[reward] == pytest.approx(want, abs=1e-5)
        is_tie = row["response"] == row["ref_response"]
        assert row["verdict"] == ("tie" if is_tie else "win" if row["reward"] > row["ref_reward"] else "loss")
        wins, ties = wins + (row["verdict"] == "win"), ties + is_tie
    measures = _measures(alone[0])
    share = (wins + ties / 2) / 14
    got = measures["win rate"]
    assert (got["value"], got["low"], got["high"], got["count"]) == (share, *wilson_interval(share, 14), 14)
    assert (measures["wins"]["value"], measures["ties"]["value"]) == (wins, ties) and 0 < wins < 14
    outcomes = [{"win": 1, "tie": 0.5, "loss": 0}[row["verdict"]] for row in rows]
    controlled = length_controlled_share(outcomes, [row["length"] - row["ref_length"] for row in rows])
    got = measures["length-controlled win rate"]
    assert (got["value"], got["low"], got["high"]) == pytest.approx(controlled[:3])
    assert {row["length"] for row in rows} == {len(row["response"]) for row in rows}
    margins = torch.tensor([row["margin"] for row in rows], dtype=torch.float64)
    got, reach = measures["mean reward margin"], 1.959963984540054 * float(margins.std()) / 14**0.5
    assert (got["value"], got["high"]) == pytest.approx((float(margins.mean()), float(margins.mean()) + reach))
    assert 0 < measures["share of unfinished responses of policy"]["value"] < 1


JUDGES = """
def longer(prompts, pairs):
    return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]
def first(prompts, pairs):
    return [0] * len(pairs)
def both(prompts, pairs):
    return [2] * len(pairs)
"""


def test_a_judge_takes_the_place_of_rewards_and_is_asked_in_both_orders(alone, world, tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)
    ready = {"responses": alone[0] / "responses_policy.jsonl", "ref_responses": alone[0] / "responses_reference.jsonl"}
    ready |= {f"{name}_name_or_path": None for name in ("model", "ref_model", "reward_model")}
    ready |= {"prompts": None, "dataset_name": None}

    def judged(name: str) -> list[dict]:
        main(_arguments(world, tmp_path / name, **ready, judge=f"{tmp_path / 'judges.py'}:{name}"))
        return read_lines(tmp_path / name / "judged.jsonl")

    for row in judged("longer"):
        difference = row["length"] - row["ref_length"]
        assert row["verdict"] == ("tie" if difference == 0 else "win" if difference > 0 else "loss")
    assert {row["verdict"] for row in judged("first")} == {"tie"}  # who likes a place says nothing
    with pytest.raises(ValueError, match="gives 2: 0 or 1 for the better one, -1 for neither"):
        judged("both")


def test_divergence_is_the_log_ratio_of_the_policys_responses(world, tmp_path):
    main(_arguments(world, tmp_path / "run", dataset_name=None, divergence=True))
    models = [AutoModelForCausalLM.from_pretrained(world / name).eval() for name in ("policy", "start")]
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    ratios = []
    for row in read_lines(tmp_path / "run" / "judged.jsonl"):
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(f"{row['prompt']}{row['response']}</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logps = [model(ids).logits[0, :-1].log_softmax(-1) for model in models]
        own, other = (logp.gather(1, ids[0, 1:, None])[start - 1 :].sum().item() for logp in logps)
        ratios.append(own - other)
    got = _measures(tmp_path / "run")["divergence from reference (nats)"]
    assert (got["value"], got["count"]) == (pytest.approx(sum(ratios) / len(ratios), abs=1e-4), len(ratios))


@pytest.mark.parametrize("source, max_length", [("pairs", None), ("chats", 6)])
def test_log_probabilities_are_those_of_trl(world, tmp_path, source, max_length):
    trl = pytest.importorskip("trl")
    path = world / f"{source}.jsonl"
    quiet = {"reward_model_name_or_path": None, "prompts": None, "ref_model_name_or_path": None}
    main(_arguments(world, tmp_path / "run", dataset_name=path, max_length=max_length, **quiet))
    got = [row for row in read_lines(tmp_path / "run" / "pairs.jsonl") if row["chosen_logp"] is not None]
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    plain |= {"output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": 3}
    config = trl.DPOConfig(precompute_ref_log_probs=True, max_length=max_length, **plain)
    model = AutoModelForCausalLM.from_pretrained(world / "policy")
    data = Dataset.from_list(read_lines(path))
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=data, processing_class=word_tokenizer())
    want = trainer.train_dataset
    assert len(got) == len(want) and (len(got) == NUM_PAIRS) == (max_length is None)
    for answer in ("chosen", "rejected"):
        logps = [row[f"{answer}_logp"] for row in got]
        assert logps == pytest.approx(want[f"ref_{answer}_logps"][:], rel=1e-5)
        both = zip(want["prompt_ids"], want[f"{answer}_ids"], strict=True)
        lengths = [len(ids[: max_length and max_length - len(prompt)]) for prompt, ids in both]
        assert [row[f"{answer}_length"] for row in got] == lengths
    assert any(row["cut"] for row in got) == (max_length is not None)


def test_accuracies_are_those_of_the_pure_functions_in_json_csv_and_the_table(alone):
    (run, printed), measures = alone, _measures(alone[0])
    names = ("chosen_logp", "rejected_logp", "chosen_length", "rejected_length")
    columns = [[row[name] for row in read_lines(run / "pairs.jsonl")] for name in names]
    reference = [[row[name] for row in read_lines(run / "pairs_reference.jsonl")] for name in names[:2]]
    for kind, others in {"log-probabilities": (), "log-ratios": reference}.items():
        want = preference_accuracy(*columns, *others)
        shares = {"length-normalised ": want.length_normalized, "length-controlled ": want.length_controlled}
        for name, share in {"": want.plain, **shares}.items():
            got = measures[f"{name}accuracy of {kind}"]
            assert (got["value"], got["low"], got["high"], got["count"]) == (*share[:3], NUM_PAIRS), name
    assert measures["mean tokens of chosen"]["value"] == sum(columns[2]) / NUM_PAIRS
    with (run / "summary.csv").open() as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(measures)
    assert all(float(row["value"]) == pytest.approx(measures[name]["value"], rel=1e-5) for name, row in rows.items())
    lines = [line for line in printed.split("\n") if line][-len(rows) - 3 :]
    assert all(line.startswith(name) for line, name in zip(lines[3:], rows, strict=True)) and "95 %" in "".join(lines)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["machine"]["commit"] == "abc1234" and summary["settings"]["temperature"] == 1.0


@pytest.mark.slow
def test_only_missing_shards_read_weights_and_stop_after_stops(alone, world, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(alone[0], run)
    (run / "work/rewards-policy/00001.jsonl").unlink()
    main(_arguments(world, run))
    for name in ("judged.jsonl", "pairs.jsonl", "summary.csv"):
        assert (run / name).read_bytes() == (alone[0] / name).read_bytes()
    for module, name in ((preference, "load_policy"), (sampling, "load_policy"), (sampling, "load_model")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("weights were read"))
    main(_arguments(world, run, tie_margin=1e9))
    assert _measures(run)["ties"]["value"] == 14
    main(_arguments(world, run, stop_after="rewards-policy"))
    assert "holds rewards-policy; start again without --stop_after" in capsys.readouterr().out


def test_policy_and_reference_draw_apart_and_equal_texts_are_ties(alone, world, tmp_path):
    run = tmp_path / "same model"
    main(_arguments(world, run, ref_model_name_or_path=world / "policy", dataset_name=None))
    rows = read_lines(run / "judged.jsonl")
    assert [row["response"] for row in rows] == [row["response"] for row in read_lines(alone[0] / "judged.jsonl")]
    assert [row["response"] for row in rows] != [row["ref_response"] for row in rows]
    ready = {"responses": run / "responses_policy.jsonl", "ref_responses": run / "responses_policy.jsonl"}
    nobody = {"model_name_or_path": None, "ref_model_name_or_path": None, "prompts": None, "dataset_name": None}
    main(_arguments(world, tmp_path / "ready", **ready, **nobody))
    measures = _measures(tmp_path / "ready")
    assert (measures["win rate"]["value"], measures["ties"]["value"]) == (0.5, 14)
    assert "share of unfinished responses of policy" not in measures


def test_ready_responses_against_a_model_from_yaml_with_prompts_of_the_pairs(alone, world, tmp_path):
    answer = [{"role": "assistant", "content": "w9"}]
    rows = [{"prompt": f"{prompt} ", "response": answer} for prompt in PROMPTS[:NUM_PAIRS]]
    (tmp_path / "ready.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = _arguments(world, tmp_path, prompts=None, ref_responses=tmp_path / "ready.jsonl", output_dir=None)
    lines = [f"{name[2:]}: {value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    (tmp_path / "settings.yaml").write_text("\n".join(lines))
    main(["--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "run")])
    judged = read_lines(tmp_path / "run" / "judged.jsonl")
    assert [row["ref_response"] for row in judged] == ["w9"] * NUM_PAIRS
    assert _measures(tmp_path / "run")["mean characters of reference"]["value"] == 2


def test_prompts_and_pairs_that_do_not_fit_are_left_out_and_told(world, tmp_path, capsys):
    long = " ".join(["w5"] * 60)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in [long, *PROMPTS[:3]]))
    shutil.copytree(world / "start", tmp_path / "other")
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "other")
    changed = {"prompts": tmp_path / "prompts.jsonl", "max_length": 4, "ref_model_name_or_path": tmp_path / "other"}
    main(_arguments(world, tmp_path / "run", **changed))
    printed = capsys.readouterr().out
    assert "No accuracies of log-ratios: policy and reference have different tokenizers." in printed
    assert "1 of 4 prompts are too long and left out." in printed
    assert "of 9 pairs are left out: the prompt alone is too long." in printed
    assert len(read_lines(tmp_path / "run" / "judged.jsonl")) == 3
    kept = [row for row in read_lines(tmp_path / "run" / "pairs.jsonl") if row["chosen_logp"] is not None]
    measures = _measures(tmp_path / "run")
    assert "accuracy of log-ratios" not in measures
    assert measures["accuracy of log-probabilities"]["count"] == len(kept) < NUM_PAIRS


REFUSED = {
    "no reference": ({"ref_model_name_or_path": None}, "the win rate needs a reference: give --ref_model"),
    "no policy": ({"model_name_or_path": None, "dataset_name": None}, "the win rate needs a policy"),
    "pairs without a policy": ({"model_name_or_path": None}, "--dataset_name needs --model_name_or_path"),
    "prompts without a judge": ({"reward_model_name_or_path": None}, "--prompts needs --reward_model_name_or_path"),
    "no prompts": ({"prompts": None, "dataset_name": None}, "the win rate needs prompts: give --prompts"),
    "a model and its responses": ({"responses": "r", "dataset_name": None}, "Give one of --model_name_or_path and"),
    "confidence": ({"confidence": 95}, r"--confidence 95.0 must lie in \(0, 1\)"),
    "tie margin": ({"tie_margin": -1}, "--tie_margin -1.0 must be at least 0"),
    "stage": ({"stop_after": "lunch"}, "--stop_after 'lunch' is unknown: choose from responses-policy"),
    "missing column": ({"dataset_name": "prompts.jsonl"}, "has no column 'chosen' but .'prompt'"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line(world, tmp_path, changes, message):
    inside = ("three labels", "prompts.jsonl")
    changes = {name: world / value if value in inside else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        main(_arguments(world, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_responses_to_other_prompts_are_refused(world, tmp_path):
    ready = tmp_path / "ready.jsonl"
    reference = {"ref_model_name_or_path": None, "ref_responses": ready, "dataset_name": None, "max_prompts": 2}
    for prompts, message in (
        (PROMPTS[1::-1], "row 0 .* of --ref_responses .* answers another prompt than --prompts"),
        (PROMPTS[:1], "--ref_responses .* answers 1 prompts and --prompts .* has 2"),
    ):
        ready.write_text("\n".join(json.dumps({"prompt": prompt, "response": "w3"}) for prompt in prompts))
        with pytest.raises(ValueError, match=message):
            main(_arguments(world, tmp_path / "run", **reference))


CHAT = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))


def test_an_answer_without_a_token_before_it_or_of_its_own_is_not_read():
    tokenizer = word_tokenizer()
    (whole,), (cut,) = (tokenize_answers("w3 w4 ", ["w5"], tokenizer, limit) for limit in (None, 2))
    assert (whole.start, len(whole.ids), whole.was_cut) == (2, 4, False)
    assert cut.was_cut and is_readable([whole]) and not is_readable([whole, cut])
    assert not is_readable([whole._replace(start=0)])


ROWS = {
    "text": {"prompt": "a b ", "chosen": "c", "rejected": "d"},
    "text without a prompt": {"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: you"},
    "one text begins the other": {"chosen": "so", "rejected": "so it is"},
    "messages": {"chosen": [CHAT, YES], "rejected": [CHAT, NO]},
    "two rounds": {"chosen": [CHAT, YES, CHAT, YES], "rejected": [CHAT, YES, CHAT, NO]},
    "a text beside messages is no prompt": {"prompt": "hi", "chosen": [CHAT, YES], "rejected": [CHAT, NO]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_prompts_are_found_as_trl_finds_them(tmp_path, row):
    trl = pytest.importorskip("trl")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (got,) = read_pairs(str(tmp_path / "pairs.jsonl"), None, "test", None)
    want = (
        row
        if isinstance(row.get("prompt"), str) and isinstance(row["chosen"], str)
        else trl.extract_prompt({side: row[side] for side in ("chosen", "rejected")})
    )
    assert {"prompt": got.prompt, "chosen": got.chosen, "rejected": got.rejected} == want


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": [CHAT, YES], "rejected": "no"}, "row 0 .* is no preference pair: give chosen and rejected as"),
        ({"chosen": "yes", "rejected": "no"}, "row 0 .* lacks a prompt or an answer: both answers must begin alike"),
        ({"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}, "row 0 .* is no preference pair"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, row, message):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_pairs(str(tmp_path / "pairs.jsonl"), None, "test", None)
