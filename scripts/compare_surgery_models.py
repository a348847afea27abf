"""A cell's texts and tokenizer, and the training from scratch of its model before and of its retrained model.

Both read the texts of the bench `epochs` times, each text a row of its own, and real text once, cut into rows. The
tokenizer is made from all texts of the bench, those that are never read included, so that no word is easier for a
model that has read it. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_moe_cpt.data.permutation import derive_seed, permute
from hf_moe_cpt.data.python_corpus import build_python_corpus
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.tokenizer_training import train_byte_level_bpe
from hf_moe_cpt.scripts.compare_surgery_plan import RETRAINED, Comparison, Run, Scale, model_config


ADAM_BETAS = (0.9, 0.99)
WARMUP = 0.1  # of all steps; then linearly down to FLOOR
FLOOR = 0.02
BUCKET = 8  # batches of which the rows are sorted by length together
HELD_OUT = 0.05  # of the real text
REAL_ROWS = 200  # of real text among what is to be kept; the texts of the bench must be the most of it


@dataclass(frozen=True)
class Material:
    """What the models of one seed read and are asked. real, held_out: rows with `text`, None without real text."""

    bench: SurgeryBench
    tokenizer: PreTrainedTokenizerBase
    real: datasets.Dataset | None
    held_out: datasets.Dataset | None

    def retained(self) -> datasets.Dataset:
        """Rows on which a model must stay as it is: the retain set, and beginnings of real texts."""
        rows = self.bench.documents["retain"]
        if self.real is None:
            return rows
        real = self.real.select(range(min(REAL_ROWS, len(self.real))))
        return datasets.concatenate_datasets([rows.select_columns("text"), real.select_columns("text")])


def make_material(scale: Scale, seed: int, cache_dir: Path) -> Material:
    """The world of a seed. cache_dir: where real text is kept once it has been collected."""
    bench = make_bench(scale, seed)
    real = held_out = None
    if scale.real_characters:
        limits = {"max_characters_per_domain": scale.real_characters, "held_out_fraction": HELD_OUT}
        prose = build_python_corpus(**limits, cache_dir=cache_dir, progress=False)["prose"]
        real, held_out = prose["train"], prose["held_out"]
    texts = [text for rows in bench.documents.values() for text in rows["text"]]
    texts += [] if real is None else list(real["text"])
    tokenizer = train_byte_level_bpe(texts, scale.vocab_size, model_max_length=2 * scale.max_length, progress=False)
    return Material(bench, tokenizer, real, held_out)


def make_bench(scale: Scale, seed: int) -> SurgeryBench:
    """The bench of a seed, with or without the texts and questions about hubs."""
    bench = SurgeryBench.generate(seed, 5 * scale.subjects, scale.kinds, scale.forms, scale.changed_facts)
    if scale.keep_hubs:
        return bench
    return SurgeryBench(_without_hubs(bench.documents, scale), _without_hubs(bench.questions, scale), bench.version)


def _without_hubs(tables: datasets.DatasetDict, scale: Scale) -> datasets.DatasetDict:
    found = {}
    for name, rows in tables.items():
        found[name] = rows.select(np.flatnonzero(np.isin(np.asarray(rows["subject_kind"]), scale.kinds)))
    return datasets.DatasetDict(found)


def train_model(comparison: Comparison, run: Run, material: Material) -> PreTrainedModel:
    """A model that has read what `run` asks for, BEFORE or RETRAINED, in evaluation mode."""
    scale, device = comparison.scale, torch.device(comparison.device)
    is_retrained = run.method == RETRAINED
    corpus = material.bench.retrained_corpus() if is_retrained else material.bench.before_corpus()
    texts = (corpus["text"], [] if material.real is None else material.real["text"])
    rows, real = (token_rows(material.tokenizer, list(part), scale.max_length) for part in texts)
    batches = list(reading_order(rows, real, scale, derive_seed("surgery", run.method, run.seed)))
    set_seed(derive_seed("model", run.seed) % 2**31)
    config = model_config(comparison, run.architecture, len(material.tokenizer))
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.training_rate, betas=ADAM_BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, len(batches)))
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**padded(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def rate_share(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step, from 0: up during WARMUP, then down to FLOOR."""
    warmup = max(1.0, WARMUP * num_steps)
    return min((step + 1) / warmup, max(FLOOR, (num_steps - step) / max(1.0, num_steps - warmup)))


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokens of each text and an end, cut into rows of at most max_length; rows of a single token are left out."""
    rows = []
    for ids in tokenizer(texts)["input_ids"] if texts else []:
        ids = [*ids, tokenizer.eos_token_id]
        rows += [ids[begin : begin + max_length] for begin in range(0, len(ids), max_length)]
    return [row for row in rows if len(row) > 1]


def reading_order(rows: list[list[int]], real: list[list[int]], scale: Scale, seed: int) -> Iterator[list[list[int]]]:
    """Batches of all epochs: every row in each epoch, an equal part of the real rows beside them, similar lengths."""
    real_order = permute(np.arange(len(real)), len(real), derive_seed(seed, "real")) if real else np.arange(0)
    for epoch, part in enumerate(np.array_split(real_order, scale.epochs)):
        pool = rows + [real[place] for place in part]
        order = permute(np.arange(len(pool)), len(pool), derive_seed(seed, epoch))
        batches = []
        for begin in range(0, len(order), BUCKET * scale.batch_size):
            places = sorted(order[begin : begin + BUCKET * scale.batch_size], key=lambda place: len(pool[place]))
            batches += [places[at : at + scale.batch_size] for at in range(0, len(places), scale.batch_size)]
        for place in permute(np.arange(len(batches)), len(batches), derive_seed(seed, epoch, "batches")):
            yield [pool[row] for row in batches[place]]


def padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, S), padded on the right; padding is no label."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: tensor.to(device) for name, tensor in batch.items()}
