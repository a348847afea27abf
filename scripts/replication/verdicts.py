"""One page with the verdicts on the claims of three papers, made of the committed results and of nothing else.

    python scripts/replication/verdicts.py

writes docs/replication/README.md of docs/benchmarks/*/results.json, which the comparisons wrote; what does not change
stands in verdicts.md. How many seeds would decide what is undecided: as many as make the interval half as wide as the
mean is far from what decides, if the mean is what it seems. Source: ours.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.reading import read_json
from hf_moe_cpt.scripts.replication import router_robustness, surgery_methods
from hf_moe_cpt.scripts.replication.sweep import CONFIDENCE, MANY, seeds_needed, t_quantile


DOCS = Path(__file__).resolve().parents[2] / "docs"
LEAST_SEEDS = surgery_methods.LEAST_SEEDS
ROUTER = {"router_s": "8 M active parameters, real text", "router_small": "tiny, the text of a Python installation"}
PREFERENCE = {"preference_world_h200": "30 M parameters", "preference_world": "tiny"}
SURGERY = "surgery_small"
ALL_MODELS = 6  # of the first paper, the dense twin among them
Results = Mapping[str, Any]


@dataclass
class VerdictArguments:
    """Where the page goes."""

    output_file: str = HfArg(default=str(DOCS / "replication" / "README.md"), help="The page.")


def write(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    (args,) = parse_arguments((VerdictArguments,), argv, program="verdicts.py", description=__doc__)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(page(DOCS / "benchmarks"), encoding="utf-8")
    print(f"wrote {args.output_file}")


def page(benchmarks: Path) -> str:
    """The page of those results that are there. benchmarks: the folder of their folders."""
    found = {
        name: read_json(benchmarks / name / "results.json")
        for name in (*ROUTER, *PREFERENCE, SURGERY)
        if (benchmarks / name / "results.json").is_file()
    }
    router, preference, surgery = router_part(found), preference_part(found), surgery_part(found)
    counts = Counter(re.findall(r"\*\*(confirmed|refuted|undecided)\*\*", router + preference + surgery))
    seeds = {name: len(found[name]["seeds"]) for name in ROUTER if name in found}
    told = []
    for name in seeds:
        models = list(dict.fromkeys(row["model"] for row in found[name]["runs"]))
        text = (
            f"[`{name.removeprefix('router_')}`](../benchmarks/{name}/README.md): {ROUTER[name]}, {seeds[name]} seeds"
        )
        told.append(text + ("" if len(models) >= ALL_MODELS else f", {' and '.join(models)} alone"))
    return (
        Path(__file__)
        .with_suffix(".md")
        .read_text(encoding="utf-8")
        .format(
            counts=", ".join(f"{counts[verdict]} {verdict}" for verdict in ("confirmed", "refuted", "undecided")),
            router=router,
            router_told="; ".join(told) or "Not run yet",
            router_cost=router_cost(found["router_s"]) if "router_s" in found else "not run yet",
            preference=preference,
            surgery=surgery,
        )
    )


def cell(claim: Mapping[str, Any] | None, mean: str, units: str, needed: int | None) -> str:
    """A verdict with its number and interval; of what is undecided, how many seeds or runs (`units`) would decide."""
    if claim is None:
        return ""
    if claim[mean] is None:
        return f"**{claim['verdict']}**, the runs are too short"
    told = f"**{claim['verdict']}** {claim[mean]:+.3g}"
    if claim["low"] is None:
        return f"{told}, one seed; at least {LEAST_SEEDS}"
    told += f" ({claim['low']:+.3g} to {claim['high']:+.3g})"
    return f"{told}; {seeds_told(needed)} {units}" if claim["verdict"] == "undecided" else told


def seeds_told(needed: int | None) -> str:
    """How many, in words."""
    return f"more than {MANY:,}" if needed is None else str(needed)


def spread_of(half_width: float, count: int) -> float:
    """The standard deviation behind half the width of Student's interval (95 %) over `count` seeds."""
    return half_width / t_quantile((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(count)


# Of a mean: how far it is from what decides, by the kind of its claim.
DISTANCES = {
    "more": lambda mean, margin: abs(mean),
    "less": lambda mean, margin: abs(mean),
    "no gain": lambda mean, margin: abs(mean - margin),
    "nothing": lambda mean, margin: abs(abs(mean) - margin),
}


def router_part(found: Mapping[str, Results]) -> str:
    """The claims of the first paper, a column for each shift of each setting."""
    columns = [(name, new) for name in ROUTER if name in found for new in found[name]["scale"]["shifts"]]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    claims = [(name, claim) for name in ROUTER if name in found for claim in found[name]["claims"]]
    order = list(router_robustness.CLAIMS)
    for name, claim in sorted(claims, key=lambda pair: order.index(pair[1]["claim"])):
        told = f" ({claim['kind'].replace('_', ' ')} {claim['margin']:g})" if "margin" in claim else ""
        text = cell(claim, "mean", "seeds", claim.get("seeds_needed"))
        if claim["seeds"] < len(found[name]["seeds"]):  # the others were cut off before all runs of the claim
            text += f" (of {claim['seeds']})"
        rows.setdefault(f"{claim['says']}{told}, {claim['unit']}", {})[name, claim["shift"]] = text
    if not columns:
        return ""
    heads = {(name, new): f"`{name.removeprefix('router_')}`, to {new}" for name, new in columns}
    pictures = [f"![](../benchmarks/{name}/comparison.png)" for name in ROUTER if name in found]
    return "\n\n".join([table(rows, heads), *pictures])


def table(rows: Mapping[str, Mapping[Any, str]], heads: Mapping[Any, str]) -> str:
    """A line for each claim, a column for each head."""
    lines = ["| claim | " + " | ".join(heads.values()) + " |", "|---" * (1 + len(heads)) + "|"]
    lines += [
        f"| {says} | " + " | ".join(cells.get(head, "") for head in heads) + " |" for says, cells in rows.items()
    ]
    return "\n".join(lines)


def router_cost(results: Results) -> str:
    """Tokens that all runs of a setting learnt."""
    tokens = {(row["model"], row["seed"], row["run"]): row["tokens"] for row in results["runs"]}
    return f"{sum(tokens.values()) / 1e9:.2f} G tokens"


def preference_part(found: Mapping[str, Results]) -> str:
    """The claims of the second paper, a column for each size of the policy."""
    heads = {n: f"[{PREFERENCE[n]}](../benchmarks/{n}/README.md)" for n in PREFERENCE if n in found}
    rows: dict[str, dict[str, str]] = {}
    for name in heads:
        claims = found[name]["claims"]
        for claim in claims:
            distance = DISTANCES[claim["kind"]](claim["value"], found[name]["margin"])
            spread = spread_of((claim["high"] - claim["low"]) / 2, claim["runs"])
            needed = seeds_needed(spread, claim["runs"], distance, 1 - (1 - CONFIDENCE) / len(claims))
            text = cell(claim, "value", "runs", needed)
            rows.setdefault(claim["claim"], {})[name] = text
    return table(rows, heads)


def surgery_part(found: Mapping[str, Results]) -> str:
    """The claims of the third paper."""
    bounds = {claim.text: claim for claim in surgery_methods.CLAIMS}
    rows: dict[str, dict[str, str]] = {}
    for row in found[SURGERY]["claims"] if SURGERY in found else ():
        seeds, claim = int(row["seeds"]), bounds.get(row["claim"])
        told = f"**{row['verdict']}** {row['value']}, {row['interval']}"
        told += f", {seeds} seeds" if seeds > 1 else ""
        if row["verdict"] == surgery_methods.UNDECIDED:
            needed = f"at least {LEAST_SEEDS}"
            if seeds > 1 and claim is not None:
                ends = [end * claim.factor for end in (claim.least, claim.most) if math.isfinite(end)]
                distance = min(abs(_number(row["value"]) - end) for end in ends)
                needed = seeds_told(seeds_needed(spread_of(_number(row["interval"]), seeds), seeds, distance))
            told += f"; {needed} seeds"
        rows[row["claim"]] = {"": told}
    return table(rows, {"": "verdict"})


def _number(text: str) -> float:
    """The first number of a text."""
    return float(re.search(r"[-+]?\d+(?:\.\d+)?", text)[0])


if __name__ == "__main__":
    run_script(write)
