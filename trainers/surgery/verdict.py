"""What the measurements of a surgery say: the gap, the rules that stop it, the verdict, and the record beside a model.

Losses and divergences are measured on the same rows of each set every time it is asked, those of the anchors on rows
that no term saw, if there are any:

    gap = sum over forgotten sets |CE - target|  +  max(0, CE(update) - update_target)
        + KL(retain) + KL(neighbour) + |CE(unseen) - CE(unseen) before step 1|

in nats per token, over the sets in force and without the first part if forgetting has no target. Targets are fixed
before step 1, so that nothing that the surgery damages can move them. The gap is 0 for a model that forgot exactly as
far as text it never read, learnt the new texts as well as it knew the old ones and changed nowhere else, and infinite
beyond max_retain_kl: the criterion of the best model.

The verdict judges a model by limits of its own, whatever the gap was compared with. V is the size of the vocabulary:
ln V is what a model pays that knows nothing. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_moe_cpt.evaluation.text_metrics import LEAST_FLUENCY
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, FORGET_SETS, UNSEEN, SurgeryConfig


if TYPE_CHECKING:
    from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


RECORD_FILE = "surgery.json"
GAP = "eval_surgery_gap"
PLACES = ("reference_cache_dir", "model_init_kwargs", "dataset_num_proc")  # of the machine, not of the run
GAP_FORMULA = (
    "surgery_gap = |CE(forgotten) - forget_target| + max(0, CE(update) - update_target) + KL(retain) + KL(neighbour) "
    "+ |drift of CE(unseen)|"
)
OFF_TARGET = 0.1  # of the target: how far from it a forgotten set may end
LEFT = 0.5  # of what was known beyond text that was not read: more first choices than that are not forgotten
KNOWN_BEFORE = 0.1  # first choices beyond those of text not read that a text had if it was known at all
MOST_KL = 0.1  # nats per token from the model before, on rows that no term saw of what was known
MOST_DRIFT = 0.1  # nats that the loss of unseen text may move

Measured = Mapping[str, float]


@dataclass
class Targets:
    """What a run aims at, in nats per token, fixed before step 1; None where there is nothing to aim at.

    forget: at most ln V and at most the loss of text that was not read, before step 1. obsolete: of that set, whose
    subjects stay known: what its texts cost where the values are a stranger's, at least what the update costs before
    step 1; None: `forget`. start: everything as it was measured before step 1. vocab_size: V.
    """

    forget: float | None = None
    update: float | None = None
    max_retain_kl: float | None = None
    start: Measured | None = None
    vocab_size: int | None = None
    obsolete: float | None = None

    def of(self, name: str) -> float | None:
        """That of a forgotten set."""
        return self.obsolete if name == "obsolete" and self.obsolete is not None else self.forget

    def check(self) -> None:
        """Raise ValueError for a target of forgetting beyond what a model pays that knows nothing."""
        most = math.inf if self.vocab_size is None else math.log(self.vocab_size)
        if self.forget is not None and self.forget > most:
            raise ValueError(
                f"forget_target={self.forget:g} is above ln(vocabulary size) = {most:.4g} nats, which a model pays "
                "that knows nothing: give less, or 'unseen'."
            )

    def drift(self, measured: Measured) -> float | None:
        """How far the loss of unseen text has moved since step 1, in nats per token."""
        name = f"{UNSEEN}_ce"
        before = (self.start or {}).get(name)
        return None if before is None or name not in measured else measured[name] - before


def surgery_gap(measured: Measured, targets: Targets) -> float:
    """The criterion of the best model in nats per token, at least 0; lower is better. See the head of this file."""
    if targets.max_retain_kl is not None and measured.get("retain_kl", 0.0) > targets.max_retain_kl:
        return math.inf
    forgotten = [name for name in FORGET_SETS if f"{name}_ce" in measured and targets.forget is not None]
    gap = sum(abs(measured[f"{name}_ce"] - targets.of(name)) for name in forgotten)
    if "update_ce" in measured:
        gap += max(0.0, measured["update_ce"] - (targets.update or 0.0))
    gap += sum(max(0.0, measured.get(f"{name}_kl", 0.0)) for name in ANCHOR_SETS if name != UNSEEN)
    return gap + abs(targets.drift(measured) or 0.0)


def stop_reason(measured: Measured, targets: Targets) -> str | None:
    """Why to stop at what was measured, or None: the anchor has slipped, or every set has reached its target."""
    most, update = targets.max_retain_kl, targets.update
    if most is not None and measured.get("retain_kl", 0.0) > most:
        return f"the KL on retained text is {measured['retain_kl']:.4g}, above max_retain_kl={most:.4g}"
    forgotten = {name: measured[f"{name}_ce"] for name in FORGET_SETS if f"{name}_ce" in measured}
    if forgotten and (targets.forget is None or any(loss < targets.of(name) for name, loss in forgotten.items())):
        return None
    if "update_ce" in measured and (update is None or measured["update_ce"] > update):
        return None
    reached = [f"{name} {loss:.4g} nats (target {targets.of(name):.4g})" for name, loss in forgotten.items()]
    if "update_ce" in measured:
        reached.append(f"update {measured['update_ce']:.4g} nats (target {update:.4g})")
    return f"every set has reached its target: {', '.join(reached)}" if reached else None


def verdict_of(measured: Measured, targets: Targets) -> str:
    """One line on a model: what is wrong with it, the worst first, or that it came out as was asked.

    measured: `<set>_ce`, `<set>_top1` (share of tokens that are the first choice) and `<set>_kl`, and `fluency`, as
    far as there are any; what is not there is not judged, and said.
    """
    found = [*_ruined(measured, targets), *_forgetting(measured, targets), *_learning(measured, targets)]
    found += _damage(measured, targets)
    if found:
        return "; ".join(found)
    judged = [name for name in ("unlearn", "obsolete", "update", *ANCHOR_SETS) if f"{name}_ce" in measured]
    return f"as asked on {', '.join(judged)}" if judged else "not judged: nothing was measured"


def _ruined(measured: Measured, targets: Targets) -> list[str]:
    found = []
    most = math.inf if targets.vocab_size is None else math.log(targets.vocab_size)
    start = targets.start or {}  # of text that the model found as hard before, nothing was ruined
    losses = {name: value for name, value in measured.items() if name.endswith("_ce")}
    beyond = {name: v for name, v in losses.items() if v > most and v > start.get(name, 0.0) + MOST_DRIFT}
    if beyond:
        worst = max(beyond, key=beyond.__getitem__)
        found.append(
            f"RUINED: the loss of {worst.removesuffix('_ce')} is {beyond[worst]:.4g} nats per token, and a model that "
            f"knows nothing pays ln V = {most:.4g}"
        )
    fluency = measured.get("fluency")
    if fluency is not None and fluency < LEAST_FLUENCY:
        found.append(f"INCOHERENT: what it writes has {fluency:.0%} of the entropy of the true texts")
    return found


def _forgetting(measured: Measured, targets: Targets) -> list[str]:
    found, start = [], targets.start or {}
    for name in FORGET_SETS:
        loss, top1, target = measured.get(f"{name}_ce"), measured.get(f"{name}_top1"), targets.of(name)
        if loss is not None and target is not None:
            # a model that read the other version alone pays for this one what this model paid for that one
            least = min(target, start.get("update_ce", target)) if name == "obsolete" else target
            if not (1 - OFF_TARGET) * least <= loss <= (1 + OFF_TARGET) * target:
                found.append(f"OFF TARGET: {name} is at {loss:.4g} nats of a target of {target:.4g}")
        unread = ("update", UNSEEN) if targets.of(name) != targets.forget else (UNSEEN, "update")  # of known subjects
        floor = next((start[f"{of}_top1"] for of in unread if f"{of}_top1" in start), 0.0)
        known = start.get(f"{name}_top1")
        is_known = top1 is not None and known is not None and known - floor > KNOWN_BEFORE
        if is_known and top1 > floor + LEFT * (known - floor):
            found.append(
                f"NOT FORGOTTEN: {top1:.0%} of the tokens of {name} are still the first choice (before: {known:.0%}"
                f"{f', text not read: {floor:.0%}' if floor else ''})"
            )
    return found


def _learning(measured: Measured, targets: Targets) -> list[str]:
    loss, start = measured.get("update_ce"), (targets.start or {}).get("update_ce")
    if loss is None or targets.update is None or start is None or start <= targets.update:
        return []
    left = (loss - targets.update) / (start - targets.update)
    return (
        [] if left <= OFF_TARGET else [f"NOT LEARNT: update is at {loss:.4g} nats of a target of {targets.update:.4g}"]
    )


def _damage(measured: Measured, targets: Targets) -> list[str]:
    found = [
        f"DAMAGED: the KL on {name} is {measured[f'{name}_kl']:.3g} nats"
        for name in ANCHOR_SETS
        if name != UNSEEN and measured.get(f"{name}_kl", 0.0) > MOST_KL  # guesses may differ: the retrained model's do
    ]
    drift = targets.drift(measured)
    if drift is not None and abs(drift) > MOST_DRIFT:
        found.append(f"DAMAGED: the loss of unseen text has moved by {drift:+.3g} nats")
    return found


def measured_weights(trainer: SurgeryTrainer) -> tuple[int, dict[str, float]]:
    """Step of the weights that a trainer holds, and what was measured of them in training, if it was."""
    state = trainer.state
    step = state.best_global_step if trainer.holds_best else state.global_step
    entries = (entry for entry in reversed(state.log_history) if GAP in entry and entry["step"] == step)
    found = next(entries, {})
    return step, {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}


def record_of(trainer: SurgeryTrainer) -> dict[str, Any]:
    """The record of the weights that a `SurgeryTrainer` holds, for JSON; docs/surgery.md explains its keys."""
    args, state, targets = trainer.args, trainer.state, trainer.aims
    gaps = [(entry["step"], entry[GAP]) for entry in state.log_history if GAP in entry]
    at_the_end = f"max_steps={args.max_steps}" if state.global_step >= args.max_steps else None
    step, measured = measured_weights(trainer)
    return {
        "verdict": trainer.verdict,
        "source": "LLM Surgery, arXiv 2409.13054",
        "objective": objective_text(args, list(trainer.sets)),
        "rows": {name: len(rows) for name, rows in (trainer.measured_sets | trainer.sets).items()},
        "forget_target": targets.forget,
        "forget_target_is": trainer.target_is,
        "obsolete_target": targets.obsolete,
        "update_target": targets.update,
        "before": {name: as_json(value) for name, value in (targets.start or {}).items()},
        "fluency": trainer.fluency,
        "held_out": {name: len(rows) for name, rows in trainer.held_out.items()},
        "starts_from": trainer.fingerprint,
        "step": step,
        "steps_made": state.global_step,
        "stopped_by": trainer.stop_reason or at_the_end,
        "gap": {
            "formula": GAP_FORMULA,
            "start": as_json(gaps[0][1]) if gaps and gaps[0][0] == 0 else None,
            "last": as_json(gaps[-1][1]) if gaps else None,
            "best": None if state.best_global_step is None else as_json(state.best_metric),
        },
        "measured": {name: as_json(value) for name, value in measured.items()},
        "target_experts": [] if trainer.targets is None else list(trainer.targets.names),
        "anchored": trainer.anchored,
        "settings": {
            name: as_json(getattr(args, name)) for name in SurgeryConfig.__annotations__ if name not in PLACES
        },
    }


def objective_text(args: SurgeryConfig, sets: list[str]) -> str:
    """The objective in force as one line, with the name of each loss."""
    losses = args.forget_losses
    kl = "KL(before || now)" if args.kl_direction == "forward" else "KL(now || before)"
    names = {name: losses[name].name for name in FORGET_SETS} | dict.fromkeys(ANCHOR_SETS, kl) | {"update": "CE"}
    return " + ".join(f"{args.weights[name]:g} * {names[name]}[{name}]" for name in sets)


def card_section(record: Mapping[str, Any]) -> str:
    """A record, as surgery.json keeps it, as a section of a model card; the verdict comes first."""
    target, gap = record["forget_target"], record["gap"]
    shown = "none" if target is None else f"{target:.4g} nats per token ({record['forget_target_is']})"
    numbers = ", ".join(f"{name} {_shown(gap[name])}" for name in ("start", "last", "best"))
    stopped_by = record["stopped_by"] or "not yet"
    rows = ", ".join(f"{name} {count}" for name, count in record["rows"].items())
    held_out = ", ".join(f"{name} {count}" for name, count in record["held_out"].items())
    where = f"on rows that no term saw ({held_out})" if held_out else "on the rows that the model was held to"
    return (
        f"## What was done\n\n**Verdict: {record['verdict']}.**\n\n"
        f"[LLM Surgery](https://arxiv.org/abs/2409.13054): texts were unlearnt, replaced and kept. `{RECORD_FILE}` "
        "holds all settings.\n\n"
        f"- objective, minimised: `{record['objective']}`\n"
        f"- rows: {rows}\n"
        f"- forgetting aims at: {shown}\n"
        f"- forgotten texts are measured on their own rows, retention {where}\n"
        f"- weights of step {record['step']} of {record['steps_made']}; stopped by: {stopped_by}\n"
        f"- gap in nats per token, 0 is perfect: {numbers}\n"
    )


def _shown(value: float | str | None) -> str:
    return "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def as_json(value: Any) -> Any:
    """Numbers that JSON has not, and functions, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    return getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
