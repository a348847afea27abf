"""What others do with a published model, where this package is not: generate, export, compile, evaluate, adapt."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_moe_cpt.scripts.push import main as push
from tests.helpers import cpt_runs


QUESTIONS = ["w3 w9 w4", "w7 w2 w30 w31 w8 w2 w11", "w40", "w21 w22 w23 w24", "w5 w6", "w12 w13 w14 w15 w16 w17"]
CHOICES = ["w8", "w17 w18", "w33 w2 w29"]
USE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name, questions = sys.argv[1], sys.argv[2].split(",")
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")

settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
alone = [model.generate(**tokenizer(text, return_tensors="pt"), **settings)[0, -6:] for text in questions]
batch = tokenizer(questions, padding=True, return_tensors="pt")
assert (batch["attention_mask"][:, 0] == 0).any()
for cache in (None, "dynamic", "static"):
    together = model.generate(**batch, **settings, cache_implementation=cache)[:, -6:]
    assert torch.equal(together, torch.stack(alone)), cache
assert torch.equal(model.generate(**batch, **settings, use_cache=False)[:, -6:], torch.stack(alone))

writer = pipeline("text-generation", model=name, tokenizer=tokenizer, trust_remote_code=True)
written = writer(questions, return_full_text=False, batch_size=4, **settings)
assert [w[0]["generated_text"] for w in written] == tokenizer.batch_decode(alone, skip_special_tokens=True)

tokens, other = torch.arange(24).view(2, 12), torch.arange(15).view(3, 5)
sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("time", min=2, max=32)}
graph = torch.export.export(
    model, (), {"input_ids": tokens, "use_cache": False}, strict=False,
    dynamic_shapes={"input_ids": sizes, "use_cache": None},
).module()
compiled = torch.compile(model, backend="aot_eager")
with torch.no_grad():
    for ids in (tokens, other):
        want = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(graph(input_ids=ids, use_cache=False).logits, want)
    torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, model(input_ids=tokens).logits)
assert not {"hf_moe_cpt", "triton"} & set(sys.modules)
"""


@pytest.mark.slow
def test_generation_a_pipeline_export_and_compile(finished, hub, command, elsewhere):
    command("push", finished["cpt"], "someone/tiny")
    elsewhere(USE, "someone/tiny", ",".join(QUESTIONS))


EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

name, folder = sys.argv[1:]
found = simple_evaluate(
    "hf",
    model_args={"pretrained": name, "trust_remote_code": True, "dtype": "float32"},
    tasks=["tiny_choice"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size=4,
    device="cpu",
    bootstrap_iters=0,
)
samples = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
likelihoods = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
print(json.dumps({"results": found["results"], "likelihoods": likelihoods}))
assert not {"hf_moe_cpt", "triton"} & set(sys.modules)
"""
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@torch.no_grad()
def _log_likelihood(model: PreTrainedModel, context: list[int], target: list[int]) -> float:
    """Sum of the log-probabilities of `target` after `context`."""
    log_probs = model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(target) - 1)
    return sum(float(log_probs[place, token]) for place, token in zip(places, target, strict=True))


@pytest.mark.slow
def test_lm_eval_finds_the_numbers_that_we_find(finished, hub, command, elsewhere, tmp_path: Path):
    """Half of the answers are those of the model."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    command("push", finished["cpt"], "someone/tiny")
    model = AutoModelForCausalLM.from_pretrained(finished["cpt"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished["cpt"])
    rows, expected = [], []
    for number, question in enumerate(QUESTIONS):
        ids = tokenizer(question).input_ids
        expected.append([_log_likelihood(model, ids, tokenizer(choice).input_ids) for choice in CHOICES])
        best = max(range(len(CHOICES)), key=expected[-1].__getitem__)
        rows.append({"question": question, "choices": CHOICES, "answer": (best + number % 2) % 3})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))

    found = json.loads(elsewhere(EVALUATE, "someone/tiny", tmp_path).stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found["likelihoods"]), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(1 / 2)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MERGE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("someone/adapter", trust_remote_code=True).eval()
assert type(model.get_base_model()).__module__.startswith("transformers_modules.")
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    found = {"adapted": model(input_ids=tokens).logits, "merged": model.merge_and_unload()(input_ids=tokens).logits}
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_adapters_on_experts_are_trained_published_loaded_and_merged(finished, hub, command, elsewhere, tmp_path):
    """An adapter is published onto a base that others can load; there its logits are those of the trained model."""
    command("push", finished["cpt"], "someone/base")
    base, adapter = AutoModelForCausalLM.from_pretrained(finished["cpt"]), tmp_path / "adapter"
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    run = cpt_runs.trainer(adapter, peft.get_peft_model(base, lora), max_steps=3, learning_rate=0.1)
    run.train()
    run.save_model()
    adapted = run.model.eval()
    moved = [name for name, value in adapted.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
    assert sum("experts" in name for name in moved) == 2 * 2 and sum("q_proj" in name for name in moved) == 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finished["cpt"] / name, adapter / name)

    config = adapter / "adapter_config.json"
    saved = json.loads(config.read_text())
    assert saved["base_model_name_or_path"] == str(finished["cpt"])
    with pytest.raises(ValueError, match="which is no Hub id: publish the base"):
        push([str(adapter), "someone/adapter"])
    named = {**saved, "base_model_name_or_path": "someone/base"}
    library = {"parent_library": type(base).__module__, "base_model_class": type(base).__name__}
    config.write_text(json.dumps({**named, "auto_mapping": library}))
    with pytest.raises(ValueError, match='give the adapter task_type="CAUSAL_LM"'):
        push([str(adapter), "someone/adapter"])
    config.write_text(json.dumps(named))
    command("push", adapter, "someone/adapter")
    card = hub.files("someone/adapter")["README.md"].decode()
    assert {"library_name: peft", "base_model: someone/base", "base_model_relation: adapter"} <= set(card.splitlines())
    assert "model.safetensors" not in hub.files("someone/adapter")

    elsewhere(MERGE, tmp_path / "out.pt")
    found, tokens = torch.load(tmp_path / "out.pt"), torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(found["adapted"], adapted(input_ids=tokens).logits)
        assert torch.equal(found["merged"], adapted.merge_and_unload()(input_ids=tokens).logits)
    torch.testing.assert_close(found["merged"], found["adapted"])
