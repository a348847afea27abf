"""Commands around a run: text tokenised once and read by it, rates tried before it, checkpoints merged after it."""

import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe_cpt.hub.checkpoint_io import decay_weights, merge
from hf_moe_cpt.scripts.continual.merge import main as merge_main
from hf_moe_cpt.scripts.continual.rewarm import main as rewarm_main
from hf_moe_cpt.scripts.continual.tokenize_text import main as tokenize_main
from hf_moe_cpt.scripts.cpt import main as cpt_main
from hf_moe_cpt.scripts.schedule import main as schedule_main
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import tiny_model
from tests.trainers.cpt.test_cpt_data import word_tokenizer, write_lines


WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def start(tmp_path):
    """A model with a tokenizer of 32 words, and the words of a run on text of two sources."""
    folder = tmp_path / "start"
    tiny_model("llama", vocab_size=32).save_pretrained(folder)
    word_tokenizer("<unk>", "<eos>", *WORDS).save_pretrained(folder)
    draw = random.Random(0)
    new = write_lines(tmp_path / "new.jsonl", [" ".join(draw.choices(WORDS[:15], k=9)) for _ in range(90)])
    old = write_lines(tmp_path / "old.jsonl", [" ".join(draw.choices(WORDS[15:], k=9)) for _ in range(30)])
    words = ["--model_name_or_path", folder, "--sources", f"new={new}:3", f"old={old}:1:replay", "--max_length", 16]
    words += ["--held_out_fraction", 0.2, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", 2, "--logging_steps", 1]
    return [str(word) for word in words]


def _history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if "loss" in k or k.startswith("eval_new_bits")} for entry in log]


def test_text_is_tokenised_once_and_read_in_place_with_the_same_numbers(tmp_path, start, capsys):
    cache, more = str(tmp_path / "cache"), ["--max_steps", "3", "--eval_steps", "2"]
    cpt_main([*start, *more, "--output_dir", str(tmp_path / "plain")])
    tokenize_main([*start, "--tokenized_data", cache])
    assert "train/new" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    (tmp_path / "new.jsonl").write_text("")  # the text itself is not needed any more
    cpt_main([*start, *more, "--tokenized_data", cache, "--output_dir", str(tmp_path / "run")])
    assert _history(tmp_path / "run") == _history(tmp_path / "plain")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before  # nor copied
    run = [*more, "--tokenized_data", cache, "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="has seed = 42 and this run 7: take it back, or run hf-moe-cpt tokenize"):
        cpt_main([*start, *run, "--seed", "7"])
    with pytest.raises(ValueError, match="the end of documents, and document_end now means"):
        cpt_main([*start, *run, "--document_end", "w3"])
    word_tokenizer("<unk>", "<eos>", *reversed(WORDS)).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="made by another tokenizer"):
        cpt_main([*start, *run])
    with pytest.raises(ValueError, match="--tokenized_data .* is in use: name a new or an empty folder"):
        tokenize_main([*start, "--tokenized_data", cache])
    with pytest.raises(ValueError, match="was not written by hf-moe-cpt tokenize"):
        cpt_main([*start, *more, "--tokenized_data", str(tmp_path), "--output_dir", str(tmp_path / "other")])


def test_the_recipe_of_the_manual_runs_as_printed(tmp_path, start, monkeypatch, capsys):
    """The file of docs/data.md, with what stands for the data set on the Hub laid out like it, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(60)]
    for folder in ("corpora/german", "src", "held", "HuggingFaceFW/fineweb-edu/sample"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpora/german/a.md").write_text(" ".join(texts[:9]))
    write_lines(tmp_path / "corpora/german/b.jsonl", texts[9:18])
    (tmp_path / "src/main.py").write_text("\n".join(texts[18:24]))
    pq.write_table(pa.table({"content": texts[24:30]}), tmp_path / "more_src.parquet")
    (tmp_path / "corpora/law.csv").write_text("n,text\n" + "".join(f"1,{text}\n" for text in texts[30:38]))
    write_lines(tmp_path / "HuggingFaceFW/fineweb-edu/sample/a.jsonl", texts[38:50])
    card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/*\n---\n"
    (tmp_path / "HuggingFaceFW/fineweb-edu/README.md").write_text(card)
    with pa.CompressedOutputStream("corpora/old_code.jsonl.zst", "zstd") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts[50:]).encode())
    (tmp_path / "held/english.txt").write_text(" ".join(texts[38:40]))
    manual = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    (five,) = re.findall(r"```yaml\n(model_name_or_path: .*?)```", manual, flags=re.DOTALL)
    (tmp_path / "five.yaml").write_text(five)
    words = ["--config", "five.yaml", "--model_name_or_path", "start", "--max_length", "8", "--max_steps", "20"]
    words += ["--held_out_fraction", "0.2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    tokenize_main([*words, "--tokenized_data", "shared"])
    cpt_main([*words, "--tokenized_data", "shared", "--per_device_train_batch_size", "10"])
    told = capsys.readouterr().out
    table = [line.split() for line in told[told.index("source ") :].splitlines() if line]
    blocks = {line[0]: int(line[-2]) for line in table if len(line) == 8 and line[3] == "%"}
    weights = {"german": (0.4, 0.4), "code": (0.2, 0.2), "law": (0.1, 0.2), "english": (0.2, 0.2)}
    weights["old_code"] = (0.1, 0.1)
    wanted = {name: 160 * first + 40 * last / 1.1 for name, (first, last) in weights.items()}  # the last fifth anneals
    assert blocks == pytest.approx(wanted, abs=7 / 8) and sum(blocks.values()) == 200
    metrics = json.loads((tmp_path / "olmoe-on-five" / "eval_results.json").read_text())
    for name in ("german", "code", "law", "english", "old_code"):
        measures = {f"eval_{name}_loss", f"eval_{name}_perplexity", f"eval_{name}_bits_per_byte"}
        assert measures <= set(metrics)
        assert f"{'adaptation' if name in ('german', 'code', 'law') else 'forgetting'}/{name}" in metrics


def test_text_is_tokenised_by_one_process_that_starts_others(tmp_path, start, monkeypatch):
    monkeypatch.setattr(CPTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="tokenize is started as one process, and --dataset_num_proc says"):
        tokenize_main([*start, "--tokenized_data", str(tmp_path / "cache")])


def test_an_extended_run_says_what_it_will_do_and_names_a_source_that_is_too_short(tmp_path, start, capsys):
    """The schedule was told before the checkpoint was read: that of a run from the beginning."""
    words = [*start, "--output_dir", str(tmp_path / "run"), "--cpt_schedule", "wsd", "--min_learning_rate", "1e-5"]
    cpt_main([*words, "--max_steps", "20", "--save_steps", "20"])
    capsys.readouterr()
    more = ["--max_steps", "40", "--resume_from_checkpoint", "last", "--allow_changes", "max_steps"]
    cpt_main([*words, *more])
    told = capsys.readouterr().out
    assert "schedule wsd, extended at step 20" in told and "warmup" not in told and "75.00 %" in told
    schedule_main(["--checkpoint", str(tmp_path / "run" / "checkpoint-20"), "--max_steps", "40"])
    drawn = capsys.readouterr().out
    assert re.search(r"constant +20 +16 +80.0% +1e-05 +1e-05", drawn) and "extended at step 20" in drawn
    with pytest.raises(ValueError, match="held-out old: the dataset holds 60 tokens in 6 documents, fewer than one"):
        cpt_main([*start, "--output_dir", str(tmp_path / "other"), "--max_steps", "2", "--max_length", "64"])


def test_rates_are_tried_before_a_run_and_one_is_recommended(tmp_path, start, capsys):
    words = [*start, "--max_steps", "100", "--trial_steps", "5", "--rates", "1e-5", "1e-2"]
    rewarm_main([*words, "--output_dir", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert "--learning_rate 0.01: it learnt most beyond what it forgot; it is the highest that was tried" in out
    assert not (tmp_path / "none").exists()
    words_of_lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in words_of_lines] == ["trial", "trial", "rate", "1e-05", "0.01", "--learning_rate"]
    rewarm_main([*words, "--max_forgetting", "1e-9"])
    told = capsys.readouterr().out.splitlines()
    assert told[-4].split() == ["rate", "adaptation", "forgetting"] and told[-3].split()[0] == "1e-05"
    assert "--learning_rate" in told[-1]


def _checkpoints(tmp_path, dtype, count=3):
    folders = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = tiny_model("mixtral")
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        model.to(dtype).save_pretrained(tmp_path / f"{dtype}-{seed}", max_shard_size="40KB")
        folders.append(tmp_path / f"{dtype}-{seed}")
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_mean_in_float64(tmp_path, dtype):
    folders, weights = _checkpoints(tmp_path, dtype), [1, 2, 5]
    merge(folders, tmp_path / "merged", weights)
    parts = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        want = sum(part[name].double() * weight for part, weight in zip(parts, weights, strict=True)) / 8
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_weights_stand_for_a_decay():
    """A step is in the mean with the sum of all later weights, which is what the decay has left of its rate."""
    assert decay_weights(4) == pytest.approx([0.25] * 4)
    weights = decay_weights(4, "one_minus_sqrt")
    left = [sum(weights[place:]) for place in range(4)]
    assert left == pytest.approx([1 - (place / 4) ** 0.5 for place in range(4)])


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_adapters_update_by_the_mean_of_the_updates(tmp_path, rslora):
    """Against the mean of `get_delta_weight`; experts and layers, of two ranks."""
    base, weights, deltas = tmp_path / "base", [1, 3], []
    tiny_model("mixtral").save_pretrained(base)
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=rank, lora_alpha=7, use_rslora=rslora, init_lora_weights=False, **targets)
        get_peft_model(model, config).save_pretrained(tmp_path / f"{seed}")
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", weights)
    for folder in ("0", "1", "merged"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / folder)
        layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
        deltas.append([layer.get_delta_weight("default") for layer in layers])
    assert len(deltas[2]) > 4 and any(delta.ndim == 3 for delta in deltas[2])
    for one, other, mean in zip(*deltas, strict=True):
        torch.testing.assert_close(mean, (one + 3 * other) / 4, rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == 5 and not saved["use_rslora"]


def test_what_does_not_belong_together_is_not_merged(tmp_path):
    one, other = _checkpoints(tmp_path, torch.float32, 2)
    with pytest.raises(ValueError, match="1 checkpoints and the weights .*: name at least two"):
        merge([one], tmp_path / "m", [1])
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="are not of one model: only one of them has"):
        merge([one, tmp_path / "llama"], tmp_path / "m", [1, 1])
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="is no adapter in safetensors, and others are"):
        merge([tmp_path / "a", one], tmp_path / "m", [1, 1])
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="target_modules=.'q_proj'. and .* .'v_proj'.: merge adapters of one kind"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m", [1, 1])
    assert not (tmp_path / "m").exists() and load_file(tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is in use"):
        merge([one, other], other, [1, 1])


def test_the_whole_is_judged_beside_its_parts(tmp_path, start, capsys):
    run = tmp_path / "run"
    more = ["--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2", "--output_dir", str(run)]
    cpt_main([*start, *more])
    capsys.readouterr()
    parts, text = [str(run / f"checkpoint-{step}") for step in (2, 4)], f"old={tmp_path / 'old.jsonl'}"
    how = ["--held_out", text, "--max_length", "16", "--use_cpu"]
    merge_main(["--checkpoints", *parts, "--output_dir", str(tmp_path / "merged"), *how])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == [*parts, str(tmp_path / "merged")]
    losses = [float(row[1]) for row in rows]
    assert len(set(losses)) == 3 and losses[2] < max(losses)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sum(p.numel() for p in again.parameters()) > 0
