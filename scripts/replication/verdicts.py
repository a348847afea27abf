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
from hf_moe_cpt.scripts.replication.sweep import CONFIDENCE, LEAST_SEEDS, MANY, seeds_needed, t_quantile


DOCS = Path(__file__).resolve().parents[2] / "docs"
ROUTER = {
    "router_s": "7 M active parameters, real text",
    "router_small": "tiny, the text of a Python installation",
    "router_ranks": "`small` before its last cut, on two ranks, each with half of the batch",
}
ELSEWHERE = {
    "router_m": "27 M active parameters, real text",
    "router_smollm2": "SmolLM2-135M, as it is and upcycled",
}
NEW = "new: "  # before what no paper claims
RANKS = "ranks.json"  # beside the results of `small`
PREFERENCE = {"preference_world_h200": "30 M parameters", "preference_world": "tiny"}
SURGERY = "surgery_small"
FEW, MORE = 10, 50  # seeds or runs that would decide
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
        for name in (*ROUTER, *ELSEWHERE, *PREFERENCE, SURGERY)
        if (benchmarks / name / "results.json").is_file()
    }
    if (ranks := benchmarks / "router_small" / RANKS).is_file():
        found["router_ranks"] = ranks_results(read_json(ranks)["runs"])
    papers, new, elsewhere = (router_part(found, *which) for which in ((ROUTER, False), (ROUTER, True), (ELSEWHERE,)))
    router = "\n\n".join((papers, new, elsewhere))
    preference, surgery = preference_part(found), surgery_part(found)
    pictures = [f"![](../benchmarks/{name}/comparison.png)" for name in list(ROUTER)[:2] if name in found]
    return (
        Path(__file__)
        .with_suffix(".md")
        .read_text(encoding="utf-8")
        .format(
            counts=counts_told(router + preference + surgery),
            open=open_told(router + preference + surgery),
            router_counts=counts_told(router),
            preference_counts=counts_told(preference),
            surgery_counts=counts_told(surgery),
            router=papers,
            new=new,
            elsewhere=elsewhere,
            pictures="\n\n".join(pictures),
            router_told=settings_told(found, ROUTER),
            elsewhere_told=settings_told(found, ELSEWHERE),
            router_cost=router_cost(found["router_s"]) if "router_s" in found else "not run yet",
            preference=preference,
            surgery=surgery,
        )
    )


def settings_told(found: Mapping[str, Results], where: Mapping[str, str]) -> str:
    """What each setting is, with its seeds, and which were not run."""
    told = []
    for name in filter(found.__contains__, where):
        folder = "router_small" if name == "router_ranks" else name
        label = f"[`{name.removeprefix('router_')}`](../benchmarks/{folder}/README.md)"
        told.append(f"{label}: {where[name]}, {len(found[name]['seeds'])} seeds")
    missing = [f"`{name.removeprefix('router_')}`" for name in where if name not in found]
    return ". ".join(filter(None, ("; ".join(told), "Not run: " * bool(missing) + ", ".join(missing))))


def counts_told(tables: str) -> str:
    """How many verdicts of each kind stand in tables."""
    counts = Counter(re.findall(r"\*\*(confirmed|refuted|undecided)\*\*", tables))
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("confirmed", "refuted", "undecided"))


def open_told(tables: str) -> str:
    """What would decide what is undecided, in numbers of seeds or runs."""
    needed = [
        math.inf if more else int(n) for more, n in re.findall(r"; (more than )?([\d,]+) (?:seeds|runs)", tables)
    ]
    few, some = sum(n <= FEW for n in needed), sum(FEW < n <= MORE for n in needed)
    return (
        f"Of these, {few} would be decided by at most {FEW} seeds or runs and {some} by {FEW + 1} to {MORE}; for "
        f"{len(needed) - few - some} it would take more: an effect, if there is one, is small beside what seeds do."
    )


def ranks_results(rows: Sequence[Mapping[str, Any]]) -> Results:
    """Of runs on two ranks the claims about balance over the batch: over both, or over the micro-batch of each."""
    scale = router_robustness.SETTINGS["small"]
    (new,) = scale.shifts
    plain, by_seed = router_robustness.continued(new, 0.0), {}
    for row in rows:
        model = "pb-granular" + ("" if row["scope"] == "global" else router_robustness.MICRO)
        before, after = {scale.old: row["old_before"]}, {scale.old: row["old_after"], new: row["new_after"]}
        by_seed.setdefault(row["seed"], {})[model] = {
            router_robustness.PRETRAINED: {"loss": before, "mri": row["mri_before"]},
            plain: {"loss": after, "loss_before": before, "mri": row["mri_after"]},
        }
    seeds = {seed: chains for seed, chains in by_seed.items() if len(chains) > 1}
    claims = []
    for name in ("batch_loss", "batch_spike", "batch_forgetting"):
        claim, measure = router_robustness.CLAIMS[name], router_robustness.MEASURES[name]
        values = [measure(router_robustness.Evidence(scale, chains, new)) for chains in seeds.values()]
        claims.append({"claim": name, "shift": new, **claim, **router_robustness.judged(values, claim["kind"])})
    return {"claims": claims, "seeds": list(seeds), "scale": {"shifts": [new]}}


def cell(claim: Mapping[str, Any] | None, mean: str, units: str, needed: int | None) -> str:
    """A verdict with its number and interval; of what is undecided, how many seeds or runs (`units`) would decide."""
    if claim is None:
        return ""
    if claim[mean] is None:
        return f"**{claim['verdict']}**, the runs are too short: {claim['margin']:g} steps and {LEAST_SEEDS} seeds"
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


def router_part(found: Mapping[str, Results], where: Mapping[str, str], is_new: bool | None = None) -> str:
    """The claims of the first paper, a column for each shift of each setting. is_new: ours alone, or the paper's."""
    claims = [
        (name, claim)
        for name in where
        if name in found
        for claim in found[name]["claims"]
        if is_new is None or claim["says"].startswith(NEW) == is_new
    ]
    columns = list(dict.fromkeys((name, claim["shift"]) for name, claim in claims))
    rows: dict[str, dict[tuple[str, str], str]] = {}
    order = list(router_robustness.CLAIMS)
    for name, claim in sorted(claims, key=lambda pair: order.index(pair[1]["claim"])):
        told = f" ({claim['kind'].replace('_', ' ')} {claim['margin']:g})" if "margin" in claim else ""
        text = cell(claim, "mean", "seeds", claim.get("seeds_needed"))
        if claim["seeds"] < len(found[name]["seeds"]):  # the others were cut off before all runs of the claim
            text += f" (of {claim['seeds']})"
        says = router_robustness.CLAIMS[claim["claim"]]["says"].removeprefix(NEW if is_new else "")
        rows.setdefault(f"{says}{told}, {claim['unit']}", {})[name, claim["shift"]] = text
    if not columns:
        return ""
    return table(rows, {(name, new): f"`{name.removeprefix('router_')}`, to {new}" for name, new in columns})


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
