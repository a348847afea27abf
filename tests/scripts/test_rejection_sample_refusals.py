"""What the rejection sampling script refuses, in one line and before any work: arguments, rows, models, folders."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_moe_cpt.scripts.rejection_sample import main
from hf_moe_cpt.scripts.rejection_sample_data import load_table
from hf_moe_cpt.scripts.rejection_sample_folder import SampleFolder
from tests.helpers.fresh_process import run_python
from tests.helpers.rejection_runs import arguments, make_world, published, ready_made


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The run that nobody disturbed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    main(arguments(world, run))
    return run


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
}


@pytest.mark.parametrize("change, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(world, tmp_path, change, message):
    good = {"prompt": "?", "answers": ["a", "b"], "stars": [1, 2]}
    with pytest.raises(ValueError, match=message):
        main(arguments(world, tmp_path / "run", **ready_made(tmp_path, [good, good | change])))


BAD_CHATS = {
    "answered": ([{"role": "assistant", "content": "x"}], "row 0 .* ends with a message of 'assistant'"),
    "no content": ([{"role": "user"}], "row 0 .* is neither a string nor a list of messages"),
}


@pytest.mark.parametrize("chat, message", BAD_CHATS.values(), ids=BAD_CHATS)
def test_conversations_that_ask_for_nothing_are_refused(world, tmp_path, chat, message):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": chat}))
    with pytest.raises(ValueError, match=message):
        main(arguments(world, tmp_path / "run", dataset_name=tmp_path / "chats.jsonl"))


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
        r"was made with reward_model_name_or_path=.* reuse the work of this one with --dataset_name .*generate "
        r"--responses_column responses\.$",
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


def test_prompts_that_changed_under_a_run_are_refused(world, tmp_path):
    row = {"prompt": "?", "answers": ["a", "b"], "stars": [1, 2]}
    for number, change in enumerate(({"prompt": "!"}, {"answers": ["a", "c"]}, {"stars": [1, 3]})):
        main(arguments(world, tmp_path / f"{number}", **ready_made(tmp_path, [row])))
        with pytest.raises(ValueError, match="was made with data_checksum="):
            main(arguments(world, tmp_path / f"{number}", **ready_made(tmp_path, [row | change])))


def test_a_fingerprint_holds_the_settings_of_all_stages_before(tmp_path):
    settings = {"generate": {"temperature": 1.0}, "score": {"model": "a"}, "select": {"tau": 0.5}}
    prints = {stage: SampleFolder(tmp_path, settings).fingerprint(stage) for stage in settings}
    for changed, kept in {"generate": [], "score": ["generate"], "select": ["generate", "score"]}.items():
        now = SampleFolder(tmp_path, settings | {changed: {"other": 1}})
        assert [stage for stage in settings if now.fingerprint(stage) == prints[stage]] == kept


def test_parts_that_start_at_the_same_moment_share_the_folder(tmp_path):
    settings = {"generate": {"temperature": 1.0}, "score": {"model": "a"}, "select": {"tau": 0.5}}
    with ThreadPoolExecutor(8) as pool:
        for number in range(30):
            folders = [SampleFolder(tmp_path / str(number), settings) for _ in range(8)]
            list(pool.map(SampleFolder.claim, folders))
            assert [path.name for path in sorted(folders[0].root.iterdir())] == ["rejection_sample.json", "stages"]
    with pytest.raises(ValueError, match="was made with tau=0.5, and now it is 2"):
        SampleFolder(tmp_path / "0", settings | {"select": {"tau": 2}}).claim()


def test_a_folder_of_others_is_refused(world, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and this tool did not write it: name another folder"):
        main(arguments(world, tmp_path))


def test_errors_are_one_line_and_exit_code_2(world, tmp_path):
    done = run_python("scripts/rejection_sample.py", *arguments(world, tmp_path / "run", num_accepted=9), check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --num_accepted 9 is more than --num_samples 4")


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
    "nothing to read": (
        "train",
        {"notes.txt": "x"},
        "has no .json, .* file of the split 'train'",
    ),
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
