"""One line on a model after surgery: ruined, incoherent, not forgotten, over-forgotten, damaged, or as it should be.

Forgotten is what a model does that never read the texts: the retrained one, or any model on the set unseen. Limits are
of this file; a difference that its interval does not settle is called undecided. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_moe_cpt.data.surgery_bench import SETS
from hf_moe_cpt.evaluation.scoring import ANCHORED_SETS, FORGOTTEN, UNSEEN
from hf_moe_cpt.evaluation.text_metrics import ngram_entropy


LEAST_FLUENCY = 0.5  # entropy of what a model writes over that of the true texts
MOST_LOST = 0.03  # of accuracy on what was to be kept
JUDGED = ("accuracy", "accuracy_cloze", "accuracy_paraphrase", "answer_probability")  # the first that was measured


def verdict_of(measures: Sequence[Mapping[str, Any]], raws: Mapping[str, Mapping[str, Any]]) -> str:
    """One line on the model after surgery: what is wrong with it, the worst first.

    What is judged by an interval is called wrong where the whole interval says so, and undecided where it reaches over
    the limit.
    """
    if "after" not in raws:
        return "no model after surgery was measured: nothing is judged"
    rows = {(row["side"], row["set"], row["metric"]): row for row in measures if row["value"] is not None}
    found = [*_ruined(rows, raws["after"]), *_not_forgotten(rows), *_lost(rows)]
    if found:
        return "; ".join(sorted(found, key=lambda line: line.startswith("undecided")))
    judged = {name for side, name, _ in rows if side == "after"} & set(SETS)
    return (
        f"as it should be on {', '.join(name for name in SETS if name in judged)}" if judged else "nothing was judged"
    )


Found = Mapping[tuple[str, str, str], Mapping[str, Any]]


def _ruined(rows: Found, raw: Mapping[str, Any]) -> Iterator[str]:
    for name, columns in raw.get("texts", {}).items():
        guess, row = columns.get("guess"), rows.get(("after", name, "loss"))
        before = rows.get(("before", name, "loss"))
        if guess and row and row["value"] > guess[0] and not (before and before["value"] > guess[0]):
            yield f"RUINED: the loss of {name} is {row['value']:.3g} nats, beyond {guess[0]:.3g} of knowing nothing"
    for name, columns in raw.get("continuations", {}).items():
        written, true = (float(ngram_entropy(columns[key]).mean()) for key in ("text", "true_text"))
        if written < LEAST_FLUENCY * true:
            yield f"INCOHERENT: what it writes on {name} has {written / true:.0%} of the entropy of the true texts"


def _not_forgotten(rows: Found) -> Iterator[str]:
    for metric in JUDGED:
        ours = rows.get(("after", FORGOTTEN, metric))
        goal = rows.get(("retrained", FORGOTTEN, metric)) or rows.get(("after", UNSEEN, metric))
        if ours is None or goal is None:
            continue
        told = f"{metric} on unlearn is {ours['value']:.3f}, of a model that never read it {goal['value']:.3f}"
        if None in (ours["low"], goal["high"]):
            yield f"undecided: {told}, of too few subjects for an interval"
        elif ours["low"] > goal["high"]:
            yield f"NOT FORGOTTEN: {told}"
        elif ours["high"] < goal["low"]:
            yield f"OVER-FORGOTTEN: {told}"
        break
    gap = rows.get(("after", FORGOTTEN, "loss_gap"))
    if gap is not None and gap["low"] is not None and (gap["low"] > 0 or gap["high"] < 0):
        word = "OVER-FORGOTTEN" if gap["low"] > 0 else "NOT FORGOTTEN"
        yield f"{word}: the loss on unlearn lies {gap['value']:+.3f} nats from that on unseen texts"


def _lost(rows: Found) -> Iterator[str]:
    for name in ANCHORED_SETS:
        for metric in JUDGED:
            ours, before = (rows.get((side, name, metric)) for side in ("after", "before"))
            if ours is None or before is None:
                continue
            told = f"{metric} on {name} went from {before['value']:.3f} to {ours['value']:.3f}"
            is_lower = before["value"] - ours["value"] > MOST_LOST
            if is_lower:
                is_sure = ours["high"] is not None and ours["high"] < before["value"] - MOST_LOST
                yield f"DAMAGED: {told}" if is_sure else f"undecided: {told}"
            break
