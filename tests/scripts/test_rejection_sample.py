"""Rejection sampling on tiny models: what it writes, what decides it, killed runs, refusals, the Hub."""

import json
import math
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.rejection_sampling import SelectionRule, select_pairs
from hf_moe_cpt.generation.pairs import SampleFolder, load_table
from hf_moe_cpt.scripts.rejection_sample import main
from tests.helpers.fresh_process import command_words, run_python
from tests.helpers.loopback_hub import USER, LoopbackHub
from tests.helpers.tiny_models import SIZES, tiny_model


VOCABULARY = 300
QUESTIONS = [f"What comes after {'one ' * (i % 5)}{i}?" for i in range(10)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy that ends about half of its answers, two reward models (with and without a template), prompts."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_byte_level_bpe([*QUESTIONS, "It is one more."], VOCABULARY, progress=False)
    tokenizer.save_pretrained(folder / "reward")
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in ("policy", "chat reward", "three labels"):
        tokenizer.save_pretrained(folder / name)
    policy = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=128)
    policy.lm_head.weight.data *= 30
    policy.generation_config.eos_token_id = [0, *range(200, 215)]
    policy.save_pretrained(folder / "policy")
    for name, num_labels in {"reward": 1, "chat reward": 1, "three labels": 3}.items():
        torch.manual_seed(1)
        sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 1}
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=num_labels))
        model.save_pretrained(folder / name)
    tokenizer.eos_token = tokenizer.chat_template = None
    policy.config.eos_token_id = policy.generation_config.eos_token_id = None
    policy.save_pretrained(folder / "endless")
    tokenizer.save_pretrained(folder / "endless")
    rows = [{"prompt": question, "chat": [{"role": "user", "content": question}]} for question in QUESTIONS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(world: Path, run: Path, **changes: object) -> list[str]:
    """The command line of a small run; None leaves an option out."""
    sizes = {"max_new_tokens": 8, "num_samples": 4, "num_accepted": 3, "shard_size": 3}
    sizes |= {"batch_size": 6, "reward_batch_size": 5, "output_dir": run}
    models = {"model_name_or_path": world / "policy", "reward_model_name_or_path": world / "reward"}
    return command_words({"dataset_name": world / "prompts.jsonl", **models, **sizes, **changes})


def shards(run: Path, stage: str) -> list[dict]:
    """The rows of a stage, in the order of the prompts."""
    return [
        json.loads(line)
        for path in sorted((run / "stages" / stage).glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def published(run: Path) -> dict[str, bytes]:
    """Every file that goes to the Hub."""
    return {name: (run / name).read_bytes() for name in ("data/train.parquet", "README.md", "summary.json")}


def ready_made(folder: Path, rows: list[dict], name: str = "ready.jsonl") -> dict[str, object]:
    """Changes of `arguments` that read responses ("answers") and scores ("stars") from these rows."""
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    read = {"dataset_name": path, "responses_column": "answers", "scores_column": "stars", "num_accepted": 2}
    return {**read, "model_name_or_path": None, "reward_model_name_or_path": None}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The run that nobody disturbed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    main(arguments(world, run))
    return run


def test_the_data_set_holds_the_pairs_that_the_rule_selects(alone):
    data = load_dataset(str(alone), split="train")
    assert data.column_names == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    rule = SelectionRule(num_accepted=3)
    expected = []
    for row in shards(alone, "score"):
        assert len(row["responses"]) == len(row["scores"]) == 4
        for pair in select_pairs(row["responses"], row["scores"], row["index"], rule).pairs:
            texts, scores = row["responses"], row["scores"]
            expected.append(
                (row["prompt"], texts[pair.chosen], texts[pair.rejected], scores[pair.chosen], scores[pair.rejected])
            )
    assert [tuple(row.values()) for row in data] == expected and len(expected) >= 8
    assert all(row["score_chosen"] > row["score_rejected"] for row in data)


def test_scores_are_the_reward_models(alone, world):
    tokenizer = AutoTokenizer.from_pretrained(world / "reward")
    model = LlamaForSequenceClassification.from_pretrained(world / "reward").eval()
    row = shards(alone, "score")[4]
    for response, score in zip(row["responses"], row["scores"], strict=True):
        inputs = tokenizer(row["prompt"] + response + tokenizer.eos_token, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=inputs["input_ids"]).logits.item(), abs=1e-6)


def test_summary_and_card_count_what_lies_in_the_shards(alone):
    rows, data = shards(alone, "score"), load_dataset(str(alone), split="train")
    summary = json.loads((alone / "summary.json").read_text())
    texts = [text for row in rows for text in row["responses"]]
    assert summary["prompts"] == 10 and summary["responses"] == 40 and summary["pairs"] == len(data)
    assert summary["responses_unfinished"] == sum(not f for row in rows for f in row["finished"]) > 0
    assert summary["dropped_empty"] == sum(not text.strip() for text in texts)
    stripped = [{text.strip() for text in row["responses"]} - {""} for row in rows]
    assert summary["dropped_identical"] == 40 - summary["dropped_empty"] - sum(map(len, stripped))
    for side in ("chosen", "rejected"):
        assert summary[f"mean_score_{side}"] == pytest.approx(sum(data[f"score_{side}"]) / len(data))
    _, head, body = (alone / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["preference", "rejection-sampling", "hf_moe_cpt"]
    assert all(text in body for text in ("`temperature` | 1", "`tau` | 0.5", "`prompts` | 10"))
    assert 0 < summary["acceptance_rate"] < 1 and summary["accepted"] == sum(min(3, len(s)) for s in stripped)


def test_rainbowpo_trains_on_it_with_its_scores(alone, world, tmp_path):
    """And so does TRL, whose trainer reads the data for it."""
    pytest.importorskip("trl")
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    step = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
    odpo = {"beta": 1.0, "home_advantage": 2.0, "score_transform": "identity"}
    data = load_dataset(str(alone), split="train")
    margins = [row["score_chosen"] - row["score_rejected"] for row in data]
    lowest, highest = (math.log1p(math.exp(2.0 * margin)) for margin in (min(margins), max(margins)))
    trainer = RainbowPOTrainer(
        AutoModelForCausalLM.from_pretrained(world / "policy"),
        args=RainbowPOConfig.from_preset("odpo", output_dir=str(tmp_path), **odpo, **step),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(world / "policy"),
    )
    loss = trainer.train().training_loss  # the policy is its own reference
    assert math.log(2) < lowest <= loss + 1e-5 and loss - 1e-5 <= highest


def test_conversations_stay_conversations(world, tmp_path):
    trl = pytest.importorskip("trl")
    asked, made = tmp_path / "asked", tmp_path / "made"
    chat = {"reward_model_name_or_path": world / "chat reward", "max_prompts": 4}
    main(arguments(world, asked, prompt_column="chat", **chat))
    main(arguments(world, made, as_chat=True, **chat))
    data = load_dataset(str(asked), split="train")
    assert data.to_list() == load_dataset(str(made), split="train").to_list()
    assert data[0]["prompt"][0]["role"] == "user" and data[0]["chosen"][0]["role"] == "assistant"
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    text = trl.apply_chat_template(data[0], tokenizer)
    assert text["prompt"] == f"<user>{data[0]['prompt'][0]['content']}<|endoftext|><assistant>"
    assert text["chosen"] == data[0]["chosen"][0]["content"] + "<|endoftext|>"


@pytest.mark.slow
def test_neither_shards_nor_batches_nor_parts_nor_other_prompts_change_the_data(alone, world, tmp_path):
    expected = load_dataset(str(alone), split="train").to_list()
    run, parts = tmp_path / "other cuts", tmp_path / "parts"
    main(arguments(world, run, shard_size=7, batch_size=5, reward_batch_size=3, max_prompts=6))
    got = load_dataset(str(run), split="train").to_list()
    for row, want in zip(got, expected[: len(got)], strict=True):
        assert all(row[name] == want[name] for name in ("prompt", "chosen", "rejected"))
    assert len(got) >= 5
    main(arguments(world, parts, part="2/2"))
    main(arguments(world, parts, stop_after="generate"))
    assert len(shards(parts, "generate")) == 10 > len(shards(parts, "score")) > 0 and not shards(parts, "select")
    main(arguments(world, parts, part="1/2"))
    assert len(shards(parts, "score")) == 10 and not (parts / "data").exists()
    main(arguments(world, parts))
    assert published(parts) == published(alone)


KILLED = """
import os, signal, sys
real = os.replace
def replace(source, target):
    if sys.argv[1] in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
from hf_moe_cpt.scripts.rejection_sample import main
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_killed_twice_ends_as_one_never_killed(alone, world, tmp_path):
    run = tmp_path / "run"
    for moment, finished in {"generate/00002-": ("generate", 2), "score/00001-": ("score", 1)}.items():
        done = run_python("-c", KILLED, moment, *arguments(world, run), check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        stage, count = finished
        assert len(list((run / "stages" / stage).glob("*.jsonl"))) == count
        assert len(list((run / "stages" / stage).glob(".*.partial"))) == 1  # it was being written
    kept = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.jsonl")}
    assert len(kept) == 4 + 1
    main(arguments(world, run))
    assert published(run) == published(alone)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing was made twice


def test_a_finished_run_reads_no_weights_and_writes_the_same(alone, world, tmp_path):
    run, policy = tmp_path / "run", tmp_path / "policy"
    shutil.copytree(world / "policy", policy)
    main(arguments(world, run, model_name_or_path=policy))
    before = published(run)
    (policy / "model.safetensors").unlink()
    main(arguments(world, run, model_name_or_path=policy, save_to_disk=True))
    assert published(run) == before and before["data/train.parquet"] == published(alone)["data/train.parquet"]
    assert load_from_disk(str(run / "arrow")).to_list() == load_dataset(str(run), split="train").to_list()


@pytest.mark.slow
def test_another_tau_reuses_the_scored_responses(alone, world, tmp_path):
    ready = {"responses_column": "responses", "scores_column": "scores"}
    nothing = {"model_name_or_path": None, "reward_model_name_or_path": None}
    same, other = tmp_path / "same", tmp_path / "other"
    source = {"dataset_name": alone / "stages" / "score"}
    main(arguments(world, same, **nothing, **ready, **source))
    assert load_dataset(str(same), split="train").to_list() == load_dataset(str(alone), split="train").to_list()
    main(arguments(world, other, **nothing, **ready, **source, tau=1e-9, pairs="tournament", rewards="raw"))
    for row in shards(other, "select"):
        best = sorted(set(row["scores"]))[-3:]
        assert {pair[f"score_{side}"] for pair in row["pairs"] for side in ("chosen", "rejected")} <= set(best)
        assert len(row["pairs"]) == 2


def test_ready_responses_as_strings_or_messages(world, tmp_path):
    answers, stars = [["a", "b"], ["c", "c", "d"], ["e"], ["f", "g"]], [[1, 2], [9, 0, 3], [4], [5, 5]]
    strings = [
        {"prompt": f"{i}?", "answers": a, "stars": s} for i, (a, s) in enumerate(zip(answers, stars, strict=True))
    ]
    turned = [
        row | {"answers": [[{"role": "assistant", "content": text}] for text in row["answers"]]} for row in strings
    ]
    for name, rows in {"strings": strings, "messages": turned}.items():
        main(arguments(world, tmp_path / name, **ready_made(tmp_path, rows, f"{name}.jsonl"), tau="inf"))
        data = load_dataset(str(tmp_path / name), split="train")
        assert [tuple(row.values()) for row in data] == [("0?", "b", "a", 2.0, 1.0), ("1?", "c", "d", 9.0, 3.0)]
    summary = json.loads((tmp_path / "strings" / "summary.json").read_text())
    counts = {"prompts": 4, "prompts_with_pairs": 2, "dropped_identical": 1, "prompts_without_margin": 1}
    assert {name: summary[name] for name in counts} == counts
    assert summary["prompts_with_fewer_than_two_distinct"] == 1 and summary["mean_score_chosen"] == 5.5


def test_long_prompts_and_unfinished_responses_are_left_out(alone, world, tmp_path):
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(world / "policy")
    lengths = [len(tokenizer(question)["input_ids"]) for question in QUESTIONS]
    limit = sorted(lengths)[6]
    main(arguments(world, run, max_prompt_length=limit, drop_unfinished=True))
    rows, summary = shards(run, "score"), json.loads((run / "summary.json").read_text())
    long = [row["index"] for row in rows if row["too_long"]]
    assert 0 < len(long) < 10 and summary["prompts_too_long"] == len(long)
    assert long == [index for index, length in enumerate(lengths) if length > limit]
    assert summary["dropped_unfinished"] == summary["responses_unfinished"] > 0
    kept = {text for row in rows for text, ended in zip(row["responses"], row["finished"], strict=True) if ended}
    data = load_dataset(str(run), split="train")
    assert {row[side] for row in data for side in ("chosen", "rejected")} <= kept
    whole = {row["index"]: row["responses"] for row in shards(alone, "generate")}
    assert all(row["responses"] == whole[row["index"]] for row in rows if not row["too_long"])


def test_a_saved_data_set_and_a_yaml_file_under_the_command_line(alone, world, tmp_path):
    Dataset.from_dict({"prompt": QUESTIONS}).save_to_disk(str(tmp_path / "saved"))
    words = arguments(world, tmp_path / "run", dataset_name=tmp_path / "saved", tau=None, num_accepted=None)
    (tmp_path / "run.yaml").write_text(
        "\n".join(f"{name[2:]}: {value}" for name, value in zip(words[::2], words[1::2], strict=True)) + "\ntau: 7\n"
    )
    main(["--config", str(tmp_path / "run.yaml"), "--tau", "0.5", "--num_accepted", "3"])
    assert (tmp_path / "run/data/train.parquet").read_bytes() == (alone / "data/train.parquet").read_bytes()


@pytest.mark.slow
def test_the_data_set_is_pushed_with_its_card_and_nothing_else(alone, world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    with LoopbackHub() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        done = run_python("scripts/rejection_sample.py", *arguments(world, run, push_to_hub=f"{USER}/pairs"))
        assert f"published at {hub.url}/" in done.stdout
        files = hub.files(f"{USER}/pairs", "dataset")
    wanted = published(alone)  # but that its card names no folder of this machine
    wanted["README.md"] = wanted["README.md"].replace(f"{world}/".encode(), b"")
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == wanted


REFUSED = {
    "one sample": ({"num_samples": 1}, "--num_samples 1 makes no pair: draw at least 2"),
    "tau": ({"tau": 0}, "tau=0.0 must be above 0"),
    "accept too many": ({"num_accepted": 5}, "--num_accepted 5 is more than --num_samples 4"),
    "accept one": ({"num_accepted": 1}, "num_accepted=1 makes no pair"),
    "greedy": ({"temperature": 0}, "--temperature 0.0 must be above 0"),
    "top_p": ({"top_p": 1.5}, r"--top_p 1.5 must lie in \(0, 1\]"),
    "pairing": ({"pairs": "best"}, "pairs='best' is unknown: choose from max_min, first_round, tournament"),
    "rewards": ({"rewards": "log"}, "rewards='log' is unknown: choose from raw, percentile"),
    "text format": ({"reward_text_format": "xml"}, "--reward_text_format 'xml' is unknown: choose from auto, chat"),
    "part": ({"part": "3/2"}, "--part '3/2' is no share"),
    "stop": ({"stop_after": "select"}, "--stop_after 'select' is unknown: choose from generate, score"),
    "batch": ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
    "shard": ({"shard_size": 0}, "--shard_size 0 must be at least 1"),
    "prompts": ({"max_prompts": 0}, "--max_prompts 0 must be at least 1"),
    "engine options": ({"vllm_options": "[1]"}, r"--vllm_options '\[1\]' must be a JSON object"),
    "no policy": ({"model_name_or_path": None}, "Give one of --model_name_or_path"),
    "two sources": ({"responses_column": "chat"}, "Give one of --model_name_or_path"),
    "no scores": ({"reward_model_name_or_path": None}, "Give one of --reward_model_name_or_path"),
    "scores of what": ({"scores_column": "stars"}, "--scores_column 'stars' needs --responses_column"),
    "column": ({"prompt_column": "text"}, r"the data set has no column 'text' but \['prompt', 'chat'\]"),
    "file": ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    "labels": ({"reward_model_name_or_path": "three labels"}, "has 3 labels and must have one"),
    "no end": ({"model_name_or_path": "endless"}, "has no EOS token and the policy's generation configuration has no"),
    "no room": ({"max_new_tokens": 128}, "max_new_tokens=128 leaves no room for a prompt"),
    "template": ({"reward_text_format": "chat"}, "has no chat template for text format 'chat'"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_before_any_work(world, tmp_path, changes, message):
    changes = {name: world / value if name.endswith("_path") and value else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        main(arguments(world, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


BAD_ROWS = {
    "empty prompt": ({"prompt": ""}, "row 1 .counted from 0. of column 'prompt' is empty: remove that row"),
    "no prompt": ({"prompt": None}, "row 1 .* is neither a string nor a list of messages"),
    "count": ({"stars": [1]}, "row 1 .* has 2 responses and 1 scores"),
    "score": ({"stars": [1, None]}, "row 1 .* of column 'stars' is no list of finite numbers"),
    "response": ({"answers": ["a", None]}, "row 1 .* of column 'answers' is no list of responses"),
    "answered": ({"prompt": [{"role": "assistant", "content": "x"}]}, "row 1 .* ends with a message of 'assistant'"),
    "no content": ({"prompt": [{"role": "user"}]}, "row 1 .* is neither a string nor a list of messages"),
}


@pytest.mark.parametrize("change, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(world, tmp_path, change, message):
    good = {"prompt": "?", "answers": ["a", "b"], "stars": [1, 2]}
    if isinstance(change.get("prompt"), list):
        good["prompt"] = [{"role": "user", "content": "?"}]
    with pytest.raises(ValueError, match=message):
        main(arguments(world, tmp_path / "run", **ready_made(tmp_path, [good, good | change])))


def test_what_is_left_without_pairs_or_template_is_said(world, tmp_path):
    row = {"prompt": "?", "answers": ["a", "b"], "stars": [1, 1]}
    with pytest.raises(ValueError, match="no pair is left of 1 prompts: 0 with fewer .* 1 without the margin"):
        main(arguments(world, tmp_path / "equal", **ready_made(tmp_path, [row])))
    with pytest.raises(ValueError, match=r"--num_accepted 3 is more than the 2 response\(s\)"):
        main(arguments(world, tmp_path / "few", **ready_made(tmp_path, [row]) | {"num_accepted": 3}))
    policy = tmp_path / "policy"
    shutil.copytree(world / "policy", policy)
    (policy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the policy's tokenizer has no chat template"):
        main(arguments(world, tmp_path / "plain", prompt_column="chat", model_name_or_path=policy))


CHANGED = {
    "temperature": ({"temperature": 0.5}, r"was made with temperature=1.0, and now it is 0.5: name another folder\.$"),
    "seed": ({"seed": 3}, "was made with seed=0, and now it is 3"),
    "policy": ({"model_name_or_path": "policy/../policy"}, "was made with model_name_or_path="),
    "reward model": (
        {"reward_model_name_or_path": "chat reward"},
        r"with reward_model_.* reuse the work of this one with --dataset_name .*generate --responses_column re.*s\.$",
    ),
    "tau": (
        {"tau": 2.0},
        "was made with tau=0.5, and now it is 2.0: name another folder and reuse the work of this one with "
        "--dataset_name .*score --responses_column responses --scores_column scores",
    ),
    "fewer prompts": ({"max_prompts": 4}, "was made with data_checksum="),
}


@pytest.mark.parametrize("changes, message", CHANGED.values(), ids=CHANGED)
def test_settings_that_do_not_fit_the_folder_are_refused(alone, world, changes, message):
    changes = {name: world / value if name.endswith("_path") else value for name, value in changes.items()}
    before = published(alone)
    with pytest.raises(ValueError, match=message) as caught:
        main(arguments(world, alone, **changes))
    assert "\n" not in str(caught.value) and published(alone) == before


def test_a_folder_is_of_one_run_whose_parts_may_start_at_once_and_its_shards_of_settings(tmp_path):
    settings = {"generate": {"temperature": 1.0}, "score": {"model": "a"}, "select": {"tau": 0.5}}
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            folders = [SampleFolder(tmp_path / str(number), settings) for _ in range(8)]
            list(pool.map(SampleFolder.claim, folders))
            assert [path.name for path in folders[0].root.iterdir()] == ["rejection_sample.json"]
    for changed, kept in {"generate": [], "score": ["generate"], "select": ["generate", "score"]}.items():
        now = SampleFolder(tmp_path / "0", settings | {changed: {"other": 1}})
        with pytest.raises(ValueError, match="was made with"):
            now.claim()
        assert [stage for stage in settings if now.shard(stage, 0) == folders[0].shard(stage, 0)] == kept


def test_a_folder_is_read_by_split_and_never_from_the_cache_of_another(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n"
    for name in ("a", "b"):
        folder = tmp_path / name / "same name"
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text(card)
        for split in ("train", "test"):
            (folder / "data" / f"{split}.jsonl").write_text(json.dumps({"prompt": f"{name} {split}"}))
        (folder / ".hidden.jsonl").write_text("{")
        for split in ("train", "test"):
            assert load_table(str(folder), split)["prompt"][:] == [f"{name} {split}"]
    (tmp_path / "a" / "loose.jsonl").write_text(json.dumps({"prompt": "loose"}))
    assert load_table(str(tmp_path / "a" / "loose.jsonl"), "train[:1]")["prompt"][:] == ["loose"]


BAD_FOLDERS = {
    "no such split": ("validation", {"train.jsonl": "{}"}, "has no .*file of the split 'validation'"),
    "nothing to read": ("train", {"notes.txt": "x"}, "has no .json, .* file of the split 'train'"),
    "two kinds": ("train", {"a.jsonl": "{}", "b.parquet": "x"}, "has the extension.s. .*: give one kind of"),
    "damaged": ("train", {"a.parquet": "x"}, "the data set .* cannot be read: Parquet file"),
}


@pytest.mark.parametrize("split, files, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folders_that_cannot_be_read_are_refused(tmp_path, split, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_table(str(tmp_path), split)
    assert "\n" not in str(caught.value)


def test_saved_data_sets_are_read_by_split(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"prompt": ["x"]})}).save_to_disk(str(tmp_path / "saved"))
    assert load_table(str(tmp_path / "saved"))["prompt"][:] == ["x"]
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'test'"):
        load_table(str(tmp_path / "saved"), "test")
    with pytest.raises(ValueError, match="a saved data set cannot be sliced, use --max_prompts"):
        load_table(str(tmp_path / "saved"), "train[:1]")
