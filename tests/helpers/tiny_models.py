"""Tiny causal LMs of transformers and of ours, a tokenizer, and the smallest data that trainers run on."""

import random
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


VOCABULARY = 48
EOS = 0
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
# Of any trainer: on the CPU, every step logged, nothing saved.
QUICK = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
CONFIGS = {
    "llama": lambda **changes: LlamaConfig(**{**SIZES, **changes}),
    "mixtral": lambda **changes: MixtralConfig(
        **{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, **changes}
    ),
    "cpt_moe": lambda **changes: CptMoeConfig(**{**SIZES, "num_experts": 7, "num_experts_per_tok": 3, **changes}),
    "cpt_moe switch": lambda **changes: CptMoeConfig(
        **{**SIZES, "num_experts": 4, "num_experts_per_tok": 1, "num_shared_experts": 0, **changes}
    ),
    "cpt_moe sinkhorn": lambda **changes: CptMoeConfig(
        **{**SIZES, "num_experts": 7, "num_experts_per_tok": 3, "router_type": "sinkhorn", **changes}
    ),
}


def tiny_model(kind: str, **changes: object) -> PreTrainedModel:
    """A model of CONFIGS with the same weights at every call, in float32 and with eager experts."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**changes))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 to w45, the roles u and a, and an end-of-text token with the id 0."""
    words = ["</s>", "<pad>", *(f"w{number}" for number in range(2, VOCABULARY - 2)), "u", "a"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


@cache
def tokenized(num_documents: int, seed: int, low: int = 1, high: int = VOCABULARY) -> Dataset:
    """Documents of 5 to 40 tokens drawn from [low, high), each of which follows its predecessor by a fixed rule.

    The rule makes them learnable: a document counts upwards from a random start, in steps of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(num_documents):
        length, start, step = (
            int(torch.randint(a, b, (), generator=generator)) for a, b in ((5, 41), (0, 99), (1, 4))
        )
        documents.append([low + (start + step * i) % (high - low) for i in range(length)])
    return Dataset.from_dict({"input_ids": documents})


def two_domains(root: Path) -> Path:
    """Folders 1-words and 2-numbers of forty documents each."""
    draw = random.Random(0)
    for domain, letters in (("1-words", "abcdefgh"), ("2-numbers", "12345678")):
        (root / domain).mkdir(parents=True)
        for number in range(40):
            words = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(160)]
            (root / domain / f"{number}.txt").write_text(" ".join(words))
    return root
