"""A plan as text for people and as JSON for programs. Sizes in GiB, times in seconds and days. Source: ours."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from hf_moe_cpt.analysis.training_memory import TrainingMemory, TrainingSetup
from hf_moe_cpt.scripts.plan_search import GIBIBYTE, RESERVED, Plan


# Names of accelerate configurations in scripts/accelerate, by engine.
CONFIG_OF_ENGINE = {"single": "one_gpu", "fsdp2": "fsdp2_8gpu", "hsdp": "hsdp_2x8", "zero3": "zero3", "ep": "ep"}
NOTE = (
    "An estimate, no measurement: memory came within 3 % of the peaks it was compared with on one GPU, several GPUs "
    "were not measured; see docs/scaling.md."
)


def as_text(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> str:
    """Tables and sentences."""
    size, setup = plan.size, plan.setup
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{size.name}: {size.total:,} parameters, {size.active:,} active for a token, {size.experts:,} in routed "
        "experts",
        f"{setup.trainer} on {setup.gpus} GPU(s) of {plan.gpu_gib:g} GiB, batch {setup.batch_size} x "
        f"{setup.sequence_length} a GPU and pass, {setup.accumulation} accumulated, {setup.precision}, "
        f"{setup.optimizer}, {setup.kernels} kernels{', checkpointing' if setup.checkpointing else ''}",
        "",
        f"{verdict} with {setup.engine}: {_gib(plan.memory.total)} of {_gib(plan.usable)} GiB usable "
        f"({RESERVED:.0%} of a GPU left to driver, communication and fragments)",
        f"largest batch that fits with {setup.engine}: {plan.largest_batch}",
    ]
    if plan.remedies:
        lines.append(f"it would fit with any of: {'; '.join(plan.remedies)}")
    elif not plan.fits:
        lines.append("no change of batch, checkpointing or number of GPUs that was tried makes it fit")
    lines += ["", "GiB on the fullest GPU", *_memory_table(plan), "", *_time_lines(plan, tokens, price_per_gpu_hour)]
    return "\n".join([*lines, "", NOTE])


def as_json(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> str:
    """All numbers; memory in bytes."""
    least, most = plan.time.step_seconds
    values: dict[str, Any] = {
        "estimate": NOTE,
        "model": asdict(plan.size) | {"layers": len(plan.size.layers)},
        "setup": asdict(plan.setup),
        "fits": plan.fits,
        "usable_bytes": int(plan.usable),
        "memory_bytes": {name: asdict(memory) | {"total": memory.total} for name, memory in plan.memory_of.items()},
        "largest_batch": plan.largest_batch,
        "remedies": list(plan.remedies),
        "step_seconds": [least, most],
        "tokens_per_step": plan.time.tokens_per_step,
        "tokens_per_second": [plan.time.tokens_per_step / most, plan.time.tokens_per_step / least],
        "speed_of": plan.gpu,
        "speed_from": asdict(plan.time.basis),
    }
    if tokens is not None:
        values["days"] = list(plan.time.days(tokens))
        if price_per_gpu_hour is not None:
            values["cost"] = [_cost(plan, days, price_per_gpu_hour) for days in plan.time.days(tokens)]
    return json.dumps(values, indent=2)


def start_command(setup: TrainingSetup) -> str:
    """How the run is started, on each node; `--config` and the rest of the trainer's options follow."""
    nodes = -(-setup.gpus // setup.gpus_per_node)
    script = f"scripts/{setup.trainer}.py"
    if setup.engine not in CONFIG_OF_ENGINE:
        machines = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {machines}--nproc_per_node {setup.ranks_of_node} {script}"
    launch = f"accelerate launch --config_file scripts/accelerate/{CONFIG_OF_ENGINE[setup.engine]}.yaml"
    if setup.engine == "single":
        return f"{launch} {script}"
    machines = f" --num_machines {nodes}" if nodes > 1 else ""
    return f"{launch} --num_processes {setup.gpus}{machines} {script}"


def _memory_table(plan: Plan) -> list[str]:
    parts = [entry.name for entry in fields(TrainingMemory) if entry.name != "moment"]
    rows = [["engine", *parts, "total", "fits", "fullest as backward"]]
    for name, memory in plan.memory_of.items():
        sizes = [_gib(getattr(memory, part)) for part in (*parts, "total")]
        when = {"begin": "begins", "end": "ends"}[memory.moment]
        rows.append([name, *sizes, "yes" if memory.total <= plan.usable else "no", when])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _time_lines(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> list[str]:
    time, setup = plan.time, plan.setup
    least, most = time.step_seconds
    basis = time.basis
    origin = "measured for this model" if time.is_same_model else f"scaled by operations from {basis.model}"
    lines = [
        f"step: {_range(least, most, 's')} for {time.tokens_per_step:,} tokens, "
        f"{_range(time.tokens_per_step / most, time.tokens_per_step / least, 'tokens/s')}"
        f"{'; slower if no transfer between GPUs is hidden, faster if all are' if setup.gpus > 1 else ''}",
        f"speed: {origin} on {basis.device}, {basis.kernels} kernels, bfloat16 weights, {basis.date}, commit "
        f"{basis.commit}; taken for {plan.gpu}",
    ]
    lines.append(f"start: {start_command(setup)}")
    if tokens is None:
        return lines
    days = time.days(tokens)
    lines.append(f"{tokens:.4g} tokens: {-(-tokens // time.tokens_per_step):,.0f} steps, {_range(*days, 'days')}")
    if price_per_gpu_hour is not None:
        costs = [_cost(plan, value, price_per_gpu_hour) for value in days]
        lines.append(f"cost: {_range(*costs, 'at')} {price_per_gpu_hour:g} a GPU and hour")
    return lines


def _cost(plan: Plan, days: float, price_per_gpu_hour: float) -> float:
    return days * 24 * plan.setup.gpus * price_per_gpu_hour


def _range(least: float, most: float, unit: str) -> str:
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (least, most)]
    return f"{texts[0] if texts[0] == texts[1] else ' to '.join(texts)} {unit}"


def _gib(size: float) -> str:
    return f"{size / GIBIBYTE:.2f}"
