"""Which engine a plan takes, and what would make a run fit that does not. Source: ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_moe_cpt.analysis.kept_tensors import KeptBytes
from hf_moe_cpt.analysis.training_memory import ModelSize, TrainingMemory, TrainingSetup, training_memory
from hf_moe_cpt.analysis.training_time import TrainingTime, training_time
from hf_moe_cpt.scripts.plan_speeds import SPEED_OF_GPU, STEPS


GIBIBYTE = 2**30
RESERVED = 0.06  # of a GPU: the driver, communication buffers, memory in pieces
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Plan:
    """An answer. memory_of: of each engine that can train this model, simplest first; setup: with the engine taken."""

    size: ModelSize
    setup: TrainingSetup
    is_engine_given: bool
    gpu: str
    gpu_gib: float
    memory_of: dict[str, TrainingMemory]
    time: TrainingTime
    largest_batch: int  # with this engine; 0 if not even one sequence fits
    remedies: tuple[str, ...]  # options that make it fit, if it does not

    @property
    def memory(self) -> TrainingMemory:
        """Of the engine taken."""
        return self.memory_of[self.setup.engine]

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may fill."""
        return usable_bytes(self.gpu_gib)

    @property
    def fits(self) -> bool:
        """Whether the estimate stays within `usable`."""
        return self.memory.total <= self.usable


def usable_bytes(gpu_gib: float) -> float:
    """What is left of a GPU of so many GiB."""
    return gpu_gib * GIBIBYTE * (1 - RESERVED)


def engines_for(size: ModelSize, setup: TrainingSetup) -> list[str]:
    """Engines that can train this model on these GPUs, the simplest first; DeepSpeed cannot run a surgery's terms."""
    if setup.gpus == 1:
        return ["single"]
    is_one_node = setup.gpus <= setup.gpus_per_node
    sharded = ["fsdp2"] if is_one_node else ["hsdp", "fsdp2"]
    expert_parallel = ["ep"] if size.num_experts >= setup.ranks_of_node else []
    deepspeed = [] if setup.trainer == "surgery" else ["zero3"]
    return ["ddp", *sharded, *deepspeed, *expert_parallel]


def make_plan(
    size: ModelSize,
    kept: KeptBytes,
    setup: TrainingSetup,
    *,
    engine: str | None,
    gpu_gib: float,
    gpu: str,
    bandwidths: tuple[float, float],
) -> Plan:
    """Choose the engine if none is given, and compute its memory and time.

    The first of `engines_for` that fits is taken, ZeRO-3 only if it is named; else the one that needs least. Raises
    ValueError for an engine that cannot train this model on these GPUs.
    """
    possible = engines_for(size, setup)
    if engine is not None and engine not in possible:
        raise ValueError(
            f"--engine {engine} cannot run {setup.trainer} of {size.name} on {setup.gpus} GPU(s), "
            f"{setup.gpus_per_node} a node: choose from {', '.join(possible)}."
        )
    memory_of = {name: training_memory(size, kept, replace(setup, engine=name)) for name in possible}
    usable = usable_bytes(gpu_gib)
    recommended = [name for name in possible if name != "zero3"]
    fitting = [name for name in recommended if memory_of[name].total <= usable]
    taken = engine or (fitting or sorted(recommended, key=lambda name: memory_of[name].total))[0]
    setup = replace(setup, engine=taken)
    return Plan(
        size=size,
        setup=setup,
        is_engine_given=engine is not None,
        gpu=gpu,
        gpu_gib=gpu_gib,
        memory_of=memory_of,
        time=training_time(size, setup, STEPS, SPEED_OF_GPU[gpu], *bandwidths),
        largest_batch=largest_batch(size, kept, setup, usable),
        remedies=() if memory_of[taken].total <= usable else remedies(size, kept, setup, usable),
    )


def largest_batch(size: ModelSize, kept: KeptBytes, setup: TrainingSetup, usable: float) -> int:
    """Most sequences (pairs, rows) of a pass on one GPU that fit; memory grows with them, so halving finds it."""
    least, most = 0, LARGEST_BATCH
    while least < most:
        middle = (least + most + 1) // 2
        if training_memory(size, kept, replace(setup, batch_size=middle)).total <= usable:
            least = middle
        else:
            most = middle - 1
    return least


def remedies(size: ModelSize, kept: KeptBytes, setup: TrainingSetup, usable: float) -> tuple[str, ...]:
    """Options to change, each of which alone or as written makes the run fit."""
    found = []
    batch = largest_batch(size, kept, setup, usable)
    if batch:
        found.append(f"--batch_size {batch}")
    if not setup.checkpointing:
        recomputing = replace(setup, checkpointing=True)
        batch = largest_batch(size, kept, recomputing, usable)
        if batch:
            smaller = "" if batch >= setup.batch_size else f" --batch_size {batch}"
            found.append(f"--gradient_checkpointing{smaller}")
    for gpus in (setup.gpus * factor for factor in (2, 4, 8, 16, 32, 64)):
        wider = replace(setup, gpus=gpus, engine="fsdp2")
        if training_memory(size, kept, wider).total <= usable:
            found.append(f"--gpus {gpus} --engine fsdp2")
            break
    return tuple(found)
