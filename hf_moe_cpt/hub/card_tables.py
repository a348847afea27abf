"""Tables and curves of a card: facts of a run in, Markdown and SVG out; nothing for facts that are missing. Ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_moe_cpt.analysis.chart import Series, line_chart
from hf_moe_cpt.hub.run_facts import RunFacts


@dataclass(frozen=True)
class Measure:
    """An evaluated number: its key in the log, how people call it, and the data that it is measured on."""

    key: str
    label: str
    data: str


_MEASURES = {
    "cpt": (
        Measure("eval_new_loss", "loss, nats per token", "held-out new text"),
        Measure("eval_replay_loss", "loss, nats per token", "held-out old text"),
        Measure("eval_loss", "loss, nats per token", "held-out text"),
        Measure("adaptation", "adaptation, nats per token", "held-out new text"),
        Measure("forgetting", "forgetting, nats per token", "held-out old text"),
    ),
    "rainbowpo": (
        Measure("eval_loss", "loss of the objective", "held-out pairs"),
        Measure("eval_rewards/accuracies", "share of pairs ranked as judged", "held-out pairs"),
        Measure("eval_rewards/margins", "margin of the implicit reward", "held-out pairs"),
        Measure("eval_margin/effective", "effective margin", "held-out pairs"),
        Measure("eval_phi/mean", "mean of phi", "held-out pairs"),
    ),
}
_SURGERY_KEY = re.compile(r"eval_(\w+)_(ce|kl)")
_ROLES = {
    "unlearn": "to be forgotten",
    "obsolete": "old versions, to be forgotten",
    "update": "to be learnt",
    "retain": "to be kept",
    "neighbour": "like the forgotten, to be kept",
    "unseen": "never read: how far to forget",
}
_SETTINGS = {
    "cpt": "learning_rate min_learning_rate constant_learning_rate cpt_schedule starting_phase warmup_fraction "
    "cooldown_fraction constant_fraction anneal_fraction replay_ratio max_length packing keep_optimizer_state "
    "weight_decay",
    "rainbowpo": "learning_rate lr_scheduler_type warmup_steps max_length weight_decay",
    "surgery": "forget_loss obsolete_loss forget_target forget_beta unlearn_weight obsolete_weight update_weight "
    "retain_weight neighbour_weight kl_direction normalization gradient_surgery max_term_grad_norm max_retain_kl "
    "update_target freeze_router router_anchor target_experts expert_anchor learning_rate max_length "
    "unlearn_batch_size obsolete_batch_size update_batch_size retain_batch_size neighbour_batch_size",
}
_SETTINGS_OF_ALL = "per_device_train_batch_size gradient_accumulation_steps world_size max_grad_norm adam_beta1 "
_SETTINGS_OF_ALL += "adam_beta2 optim bf16 fp16 seed"
COMPONENTS = (
    "beta length_normalization mixing_alpha home_advantage mix_home_advantage home_advantage_from score_transform "
    "contextual_scaling link label_smoothing sft_weight"
).split()
_CURVES = {
    "cpt": (
        ("Loss on held-out text", "loss (nats/token)", {"eval_new_loss": "new text", "eval_replay_loss": "old text"}),
        ("Share of the busiest expert", "MRI", {"mri": "mean over layers"}),
    ),
    "rainbowpo": (
        ("Does the policy rank pairs as judged?", "share of pairs", {"rewards/accuracies": "training pairs",
         "eval_rewards/accuracies": "held-out pairs"}),
    ),
    "surgery": (
        ("Cross entropy of each set", "nats/token", {f"eval_{name}_ce": name for name in _ROLES}),
    ),
}  # fmt: skip


def number(value: Any) -> str:
    """A value as people read it: four digits of a float, thousands of an integer separated."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty in every row; "" without rows."""
    listed = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in listed)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in listed)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if listed else ""


def measures_of(facts: RunFacts) -> list[Measure]:
    """The evaluated numbers that a folder holds, in the order of the card."""
    if facts.method != "surgery":
        found = [measure for measure in _MEASURES[facts.method] if measure.key in facts.final]
        of_sources = {"eval_new_loss", "eval_replay_loss"} & facts.final.keys()
        return [m for m in found if not (m.key == "eval_loss" and facts.method == "cpt" and of_sources)]
    names = [match[1] for key in facts.final if (match := _SURGERY_KEY.fullmatch(key)) and match[1] in _ROLES]
    found = []
    for name in sorted(set(names), key=list(_ROLES).index):
        for kind, label in (("ce", "cross entropy, nats per token"), ("kl", "KL from before, nats per token")):
            if f"eval_{name}_{kind}" in facts.final:
                found.append(Measure(f"eval_{name}_{kind}", label, f"{name}: {_ROLES[name]}"))
    if "eval_surgery_gap" in facts.final:
        found.append(Measure("eval_surgery_gap", "surgery gap, nats per token", "all sets"))
    return found


def results_table(facts: RunFacts) -> str:
    """Each evaluated number at step 0 and at the end."""
    rows = [
        (m.label, m.data, number(facts.start[m.key]) if m.key in facts.start else "", number(facts.final[m.key]))
        for m in measures_of(facts)
    ]
    return table(("measure", "data", "before", "after"), rows)


def training_table(facts: RunFacts) -> str:
    """Steps, tokens, time and the settings that matter to the method, as far as the folder tells them."""
    rows = _operation(facts.kept) if facts.method == "surgery" else []
    rows += [("optimizer steps", number(facts.steps)), ("tokens", number(facts.tokens))]
    rows += [("wall clock", f"{number(facts.seconds)} s" if facts.seconds is not None else "None")]
    if facts.method == "cpt":
        rows += [("phase of the schedule when saved", str(facts.kept.get("phase")))]
        rows += [("learning rate when saved", number(facts.kept.get("learning_rate")))]
    names = (_SETTINGS[facts.method] + " " + _SETTINGS_OF_ALL).split()
    if (facts.arguments.get("max_steps") or 0) <= 0:
        names.append("num_train_epochs")
    rows += [(f"`{name}`", number(facts.arguments.get(name))) for name in names]
    return table(("setting", "value"), [row for row in rows if row[1] not in ("None", "")])


def _operation(kept: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What surgery.json says was done: rows without a value are dropped by the caller."""
    gap = kept.get("gap") or {}
    rows = [("objective, minimised", f"`{kept['objective']}`" if kept.get("objective") else "")]
    rows += [("rows", ", ".join(f"{name} {count}" for name, count in (kept.get("rows") or {}).items()))]
    rows += [("forgetting aims at, nats per token", number(kept.get("forget_target")))]
    rows += [("weights are those of step", number(kept.get("step"))), ("stopped by", str(kept.get("stopped_by")))]
    return [*rows, *((f"gap: {name}", number(gap.get(name))) for name in ("start", "last", "best"))]


def components_table(facts: RunFacts) -> str:
    """The switches of RainbowPO's objective, and the scale of phi where phi is in use."""
    rows = [(f"`{name}`", number(facts.arguments[name])) for name in COMPONENTS if name in facts.arguments]
    scale = facts.kept.get("dispersion_scale")
    text = table(("component", "value"), rows)
    if facts.run.get("components"):
        text = f"```\n{facts.run['components']}\n```\n\n{text}"
    return "\n\n".join(part for part in (text, f"Scale of phi: {scale:.4g}." if scale is not None else "") if part)


def experts_table(facts: RunFacts) -> str:
    """Imbalance of the routers in training: at the first and the last logged step."""
    labels = {"mri": "share of the busiest expert (MRI)", "mri_normalized": "the same over that of balance"}
    rows = []
    for key, label in labels.items():
        values = [entry[key] for entry in facts.log if key in entry]
        if values:
            rows.append((label, number(values[0]), number(values[-1])))
    return table(("mean over layers", "first logged step", "last logged step"), rows)


def sizes_table(config: Mapping[str, Any], parameters: int | None) -> str:
    """Sizes of the model, from its configuration and the headers of its weights."""
    names = (
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size max_position_embeddings num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
        "num_shared_experts router_type"
    ).split()
    rows = [("parameters", number(parameters) if parameters else "")]
    rows += [(f"`{name}`", number(config[name])) for name in names if config.get(name) is not None]
    return table(("size", "value"), [row for row in rows if row[1]]) if config else ""


def machine_table(facts: RunFacts) -> str:
    """Devices and library versions of the process that trained."""
    rows = [(name, number(facts.run.get(name))) for name in ("device", "processes") if facts.run.get(name)]
    rows += [(name, str(version)) for name, version in (facts.run.get("versions") or {}).items()]
    return table(("part", "value"), rows)


def curves(facts: RunFacts) -> dict[str, str]:
    """SVG charts of the log by file name; a curve needs two points."""
    charts = {}
    for title, unit, keys in _CURVES[facts.method]:
        series = []
        for key, name in keys.items():
            points = [(e["step"], e[key]) for e in facts.log if key in e and "step" in e and math.isfinite(e[key])]
            if len({step for step, _ in points}) > 1:
                series.append(Series(name, [float(x) for x, _ in points], [float(y) for _, y in points]))
        if series:
            file = "plots/" + re.sub(r"\W+", "_", title.lower()).strip("_") + ".svg"
            charts[file] = line_chart(series, title=title, x_label="step", y_label=unit, standalone=True)
    return charts
