"""From selected responses to a data set with its summary and its card, on disk and on the Hub. Source: ours.

Everything written here is a function of the shards and their settings: no date, no time taken, no name of a machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_moe_cpt.scripts.quickstart_folder import write_json
from hf_moe_cpt.scripts.rejection_sample_folder import Settings


DATA_FILE = "data/train.parquet"
PUBLISHED = ["README.md", "summary.json", DATA_FILE]

Row = dict[str, Any]


def preference_rows(selected: Iterable[Row]) -> list[Row]:
    """One row per pair, in the explicit-prompt format of TRL: strings, or messages where the prompt is messages."""
    rows = []
    for prompt in selected:
        for pair in prompt["pairs"]:
            texts = {side: pair[side] for side in ("chosen", "rejected")}
            if not isinstance(prompt["prompt"], str):
                texts = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
            scores = {name: pair[name] for name in ("score_chosen", "score_rejected")}
            rows.append({"prompt": prompt["prompt"], **texts, **scores})
    return rows


def summarize(selected: Sequence[Row]) -> dict[str, Any]:
    """Counts and means of a run. Means over pairs or prompts of which there are none are None."""
    pairs = [pair for row in selected for pair in row["pairs"]]
    with_pairs = [row for row in selected if row["pairs"]]

    def total(name: str) -> int:
        return sum(row[name] for row in selected)

    def over_pairs(value: Callable[[Row], float]) -> float | None:
        return statistics.fmean(map(value, pairs)) if pairs else None

    rates = [row["acceptance"] for row in selected if row["acceptance"] is not None]
    scores = [score for row in selected for score in row["scores"]]
    return {
        "prompts": len(selected),
        "prompts_with_pairs": len(with_pairs),
        "prompts_too_long": sum(row["too_long"] for row in selected),
        "prompts_with_fewer_than_two_distinct": sum(row["distinct"] < 2 and not row["too_long"] for row in selected),
        "prompts_without_margin": sum(row["distinct"] >= 2 and not row["pairs"] for row in selected),
        "responses": total("responses"),
        "responses_unfinished": total("unfinished"),
        "responses_cut_for_reward_model": total("cut"),
        "dropped_unfinished": total("dropped_unfinished"),
        "dropped_empty": total("dropped_empty"),
        "dropped_identical": total("dropped_identical"),
        "accepted": total("accepted"),
        "acceptance_rate": statistics.fmean(rates) if rates else None,
        "pairs": len(pairs),
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_score_chosen": over_pairs(lambda pair: pair["score_chosen"]),
        "mean_score_rejected": over_pairs(lambda pair: pair["score_rejected"]),
        "mean_characters_chosen": over_pairs(lambda pair: len(pair["chosen"])),
        "mean_characters_rejected": over_pairs(lambda pair: len(pair["rejected"])),
        "share_of_pairs_with_longer_chosen": over_pairs(lambda pair: len(pair["chosen"]) > len(pair["rejected"])),
    }


def write_output(root: Path, selected: Sequence[Row], settings: Settings, save_to_disk: bool) -> dict[str, Any]:
    """Write data, card and summary, in that order, and return the summary.

    save_to_disk: also write the folder arrow/ for `datasets.load_from_disk`. Raises ValueError if no pair is left.
    """
    summary = summarize(selected)
    if not summary["pairs"]:
        raise ValueError(
            f"no pair is left of {summary['prompts']} prompts: {summary['prompts_with_fewer_than_two_distinct']} with "
            f"fewer than two distinct responses, {summary['prompts_without_margin']} without the margin, "
            f"{summary['prompts_too_long']} too long; sample more, or hotter, or ask for a smaller margin."
        )
    data = Dataset.from_list(preference_rows(selected))
    path = root / DATA_FILE
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    data.to_parquet(str(partial))
    os.replace(partial, path)
    if save_to_disk:
        _save_to_disk(data, root / "arrow")
    (root / "README.md").write_text(card(settings, summary), encoding="utf-8")
    write_json(root / "summary.json", summary)
    return summary


def _save_to_disk(data: Dataset, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    data.save_to_disk(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


# No `configs:` in the head: `datasets` 5.2 takes two local folders of one name with the same `configs:` for one data
# set and loads the cached rows of the first for both. It finds data/train.parquet by its name.
CARD = """---
tags:
- preference
- rejection-sampling
- hf_moe_cpt
---
# Preference pairs by rejection sampling

{pairs} pairs for {prompts_with_pairs} of {prompts} prompts. Columns: `prompt`, `chosen`, `rejected`, `score_chosen`,
`score_rejected`. Made by `scripts/rejection_sample.py` of hf_moe_cpt {version}; the same settings on the same machine
make the same file.

## How the responses were made
{generate}

## How they were scored
{score}

## How the pairs were chosen
{select}

A response is accepted with probability `exp((r - r_max) / tau)` among those that are left (statistical rejection
sampling, Liu et al. 2024, arXiv 2309.06657); `percentile` rewards are ranks within a prompt (RainbowPO, arXiv
2410.04203). Scores in the columns are those of the reward model or of the column named above, never ranks.

## Counts
{counts}
"""


def card(settings: Settings, summary: dict[str, Any]) -> str:
    """The README.md of the data set: what it was made of."""
    from hf_moe_cpt import __version__

    tables = {stage: _table("setting", settings[stage]) for stage in settings}
    return CARD.format(version=__version__, counts=_table("count", summary), **tables, **summary)


def _table(head: str, values: dict[str, Any]) -> str:
    shown = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    lines = [f"| `{name}` | {text.replace('|', '&#124;')} |" for name, text in shown.items() if text != "None"]
    return "\n".join([f"| {head} | value |", "|---|---|", *lines])


def publish(root: Path, repo_id: str, private: bool) -> str:
    """Upload data, card and summary to a data set on the Hub, made if it is new; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=root,
        allow_patterns=PUBLISHED,
        commit_message="Preference pairs by rejection sampling",
    )
    return str(address)
