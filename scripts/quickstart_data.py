"""Text, tokenizer and tokens of the quickstart, made once and kept in its output folder. Source: ours."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moe_cpt.data.corpus_cache import Corpus, load_corpus, save_corpus
from hf_moe_cpt.data.folder_corpus import load_folder_corpus
from hf_moe_cpt.data.python_corpus import build_python_corpus
from hf_moe_cpt.data.tokenization import tokenize_documents
from hf_moe_cpt.data.tokenizer_training import train_byte_level_bpe
from hf_moe_cpt.scripts.quickstart_folder import QuickstartFolder
from hf_moe_cpt.scripts.quickstart_plan import HELD_OUT_FRACTION, Plan


TOKENS_PER_HELD_OUT_DOCUMENT = 1024  # from its beginning; many short views of a domain measure it better than few long


@dataclass(frozen=True)
class DomainTokens:
    """One domain, tokenised: column input_ids, a document per row."""

    name: str
    train: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class QuickstartData:
    """The two domains with their tokenizer; `facts` goes into the results."""

    tokenizer: PreTrainedTokenizerBase
    old: DomainTokens
    new: DomainTokens
    facts: dict[str, Any]


def prepare_data(plan: Plan, folder: QuickstartFolder) -> QuickstartData:
    """Read or collect the text, train the tokenizer on both domains, tokenise."""
    corpus = _corpus(plan, folder)
    tokenizer = _tokenizer(corpus, plan, folder)
    domains = [_tokenised(name, sides, tokenizer, plan.scale.held_out_tokens) for name, sides in corpus.items()]
    facts = {domain.name: _facts(domain, corpus[domain.name]) for domain in domains}
    return QuickstartData(tokenizer, *domains, facts)


def _corpus(plan: Plan, folder: QuickstartFolder) -> Corpus:
    """From the folder if a run before this one left it there, so that resuming reads the same text."""
    kept = load_corpus(folder.root, "corpus")
    if kept is not None:
        return kept
    if plan.data_dir is not None:
        corpus = load_folder_corpus(plan.data_dir, held_out_fraction=HELD_OUT_FRACTION, seed=plan.seed)
    else:
        corpus = build_python_corpus(
            max_characters_per_domain=plan.characters_per_domain, held_out_fraction=HELD_OUT_FRACTION, seed=plan.seed
        )
    save_corpus(corpus, folder.root, "corpus")
    return load_corpus(folder.root, "corpus")


def _tokenizer(corpus: Corpus, plan: Plan, folder: QuickstartFolder) -> PreTrainedTokenizerBase:
    if not folder.tokenizer.is_dir():
        texts = chain.from_iterable(sides["train"]["text"] for sides in corpus.values())
        trained = train_byte_level_bpe(
            texts, plan.scale.vocab_size, model_max_length=plan.scale.max_length, progress=False
        )
        unfinished = folder.root / ".tokenizer"
        shutil.rmtree(unfinished, ignore_errors=True)
        trained.save_pretrained(unfinished)
        unfinished.rename(folder.tokenizer)
    return AutoTokenizer.from_pretrained(folder.tokenizer, local_files_only=True)


def _tokenised(
    name: str, sides: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, held_out_tokens: int
) -> DomainTokens:
    held_out = tokenize_documents(sides["held_out"], tokenizer)
    return DomainTokens(name, tokenize_documents(sides["train"], tokenizer), sample_of(held_out, held_out_tokens))


def sample_of(documents: Dataset, num_tokens: int) -> Dataset:
    """The beginnings of the first documents, about `num_tokens` tokens together, or of all if there are fewer."""
    rows, size = [], 0
    for row in documents:
        rows.append(row["input_ids"][:TOKENS_PER_HELD_OUT_DOCUMENT])
        size += len(rows[-1])
        if size >= num_tokens:
            break
    return Dataset.from_dict({"input_ids": rows}, features=documents.features)


def _facts(domain: DomainTokens, sides: dict[str, Dataset]) -> dict[str, int]:
    return {
        "train_documents": len(sides["train"]),
        "train_characters": sum(map(len, sides["train"]["text"])),
        "train_tokens": sum(map(len, domain.train["input_ids"])),
        "held_out_tokens": sum(map(len, domain.held_out["input_ids"])),
    }
