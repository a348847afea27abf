"""The scale of phi: the reference's entropies on training pairs, and the file that keeps the number with a checkpoint.

Source: the authors' constant 0.29 is 1 / mean(-ln H) of their model and data; here it is measured. docs/rainbowpo.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_moe_cpt.trainers.rainbowpo.preference_data import AnyDataset
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


SCALE_FILE = "rainbowpo.json"


def calibration_sample(dataset: AnyDataset, count: int | None) -> Dataset:
    """`count` pairs spread evenly over a data set, all for None; of a stream the first ones."""
    if isinstance(dataset, IterableDataset):
        if count is None:
            raise ValueError("calibration_pairs=None means all pairs, which a stream does not end: set a number.")
        return Dataset.from_list(list(dataset.take(count)))
    if count is None or count >= len(dataset):
        return dataset
    return dataset.select(torch.linspace(0, len(dataset) - 1, count).round().long().tolist())


def training_entropies(trainer: Any) -> Tensor:
    """H (N,) of training pairs under the reference of a `RainbowPOTrainer`; from its columns where precomputed."""
    args = trainer.args
    data = calibration_sample(trainer.train_dataset, args.calibration_pairs)
    if "ref_chosen_logps" in data.column_names:
        return torch.tensor(data["ref_chosen_logps"][:])[:, 1]
    batch_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
    loader = DataLoader(data, batch_size=batch_size, collate_fn=trainer.data_collator)
    model = trainer.ref_model or trainer.model
    entropies = []
    for batch in tqdm(trainer.accelerator.prepare(loader), desc="Calibrating phi", disable=args.disable_tqdm):
        chosen, _ = trainer.compute_ref_log_probs(model, batch)
        entropies.append(trainer.accelerator.gather_for_metrics(chosen[:, 1].contiguous()).cpu())
    return torch.cat(entropies)


def write_scale(folder: str | Path, scale: float | None) -> None:
    """Keep the scale with a checkpoint."""
    (Path(folder) / SCALE_FILE).write_text(json.dumps({"dispersion_scale": scale}) + "\n", encoding="utf-8")


def read_scale(checkpoint: str | Path) -> float | None:
    """The scale kept with a checkpoint; None if there is none."""
    path = Path(checkpoint) / SCALE_FILE
    return json.loads(path.read_text(encoding="utf-8"))["dispersion_scale"] if path.exists() else None


def add_components(args: RainbowPOConfig, scale: float | None) -> None:
    """Append the components of the objective and the scale of phi to the card of a run, unless they are in it."""
    card = Path(args.output_dir) / "README.md"
    if args.process_index or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if "## Components of the objective" not in text:
        told = "" if scale is None else f"\n\nScale of phi: {scale:.4g}."
        section = f"\n## Components of the objective\n\n```\n{args.components()}\n```{told}\n"
        card.write_text(text + section, encoding="utf-8")
