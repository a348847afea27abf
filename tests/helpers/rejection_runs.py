"""Models, prompts and arguments for runs of the rejection sampling script, and readers of what they write."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from tests.helpers.fresh_process import command_words
from tests.helpers.tiny_models import SIZES, tiny_model


VOCABULARY = 300
QUESTIONS = [f"What comes after {'one ' * (i % 5)}{i}?" for i in range(10)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_world(folder: Path) -> Path:
    """A policy that ends about half of its answers, two reward models (with and without a template), prompts."""
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
    settings = {
        "dataset_name": world / "prompts.jsonl",
        "model_name_or_path": world / "policy",
        "reward_model_name_or_path": world / "reward",
        "max_new_tokens": 8,
        "num_samples": 4,
        "num_accepted": 3,
        "batch_size": 6,
        "reward_batch_size": 5,
        "shard_size": 3,
        "output_dir": run,
        **changes,
    }
    return command_words(settings)


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
    return {
        "dataset_name": path,
        "model_name_or_path": None,
        "reward_model_name_or_path": None,
        "responses_column": "answers",
        "scores_column": "stars",
        "num_accepted": 2,
    }
