"""Estimate whether a training run fits on the GPUs, how long it takes and what it costs, before anything is started.

hf-moe-cpt plan --preset pb-granular-2b --gpus 8 --gpu-memory 80 --tokens 200e9

Nothing is loaded: parameters are counted on a model without weights, what the layers keep for the backward pass on
tensors without memory, and speed is scaled from committed benchmarks. docs/scaling.md tells the arithmetic and its
errors. The table goes to the screen; `--json` prints the same as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.planning.memory import (
    ENGINES,
    KERNELS,
    OPTIMIZERS,
    PRECISIONS,
    TRAINERS,
    TrainingSetup,
    measure_kept,
    measure_size,
)
from hf_moe_cpt.planning.plan import SPEED_OF_GPU, as_json, as_text, make_plan, read_config
from hf_moe_cpt.reading import reading


REFERENCES = {"cpt": ("none",), "rainbowpo": ("copy", "none"), "surgery": ("cache", "copy", "none")}


def _one_of(names: Sequence[str]) -> str:
    return f"One of {', '.join(names)}."


@dataclass
class PlanArguments:
    """What is trained, on what, and how."""

    preset: str | None = HfArg(default=None, help="One of our presets, or a stock model at its size.")
    model: str | None = HfArg(
        default=None, help="Or the folder or Hub id of any causal LM; only its config.json is read."
    )
    gpus: int = HfArg(default=1, help="GPUs of all nodes.")
    gpus_per_node: int = HfArg(default=8, help="GPUs that share a fast connection.")
    gpu_memory: float = HfArg(default=80.0, help="Of one GPU, in GiB; 6 %% are left to the rest.")
    gpu: str | None = HfArg(default=None, help=f"Whose speed: {', '.join(SPEED_OF_GPU)}; by default by --gpu_memory.")
    tokens: float | None = HfArg(default=None, help="To train on, such as 200e9: adds days and cost.")
    engine: str | None = HfArg(default=None, help=f"{_one_of(ENGINES)} Default: simplest that fits.")
    trainer: str = HfArg(default="cpt", help=_one_of(TRAINERS))
    batch_size: int = HfArg(
        default=8, help="Of one GPU and pass: sequences, pairs (rainbowpo), rows of each term (surgery)."
    )
    seq_length: int = HfArg(default=2048, help="Tokens of a sequence.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Passes of an optimizer step.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute layers in the backward pass.")
    precision: str = HfArg(
        default="mixed", help=f"{_one_of(list(PRECISIONS))} mixed: float32 weights, bfloat16 autocast."
    )
    optimizer: str = HfArg(default="adamw", help=_one_of(OPTIMIZERS))
    kernels: str = HfArg(
        default="fused", help=f"{_one_of(KERNELS)} fused: as the trainers run any model; plain: as transformers does."
    )
    reference: str | None = HfArg(default=None, help="none, copy (rainbowpo's default) or cache (surgery's default).")
    terms: int = HfArg(
        default=5, metadata={"range": "[1, 1000]"}, help="Sets of text of a surgery, each with a backward pass."
    )
    price_per_gpu_hour: float | None = HfArg(default=None, help="In any currency: adds the cost.")
    bandwidth: float = HfArg(default=450.0, help="GB/s that a GPU sends inside its node.")
    network_bandwidth: float = HfArg(default=50.0, help="GB/s that a GPU sends to other nodes.")
    json: bool = HfArg(default=False, help="Print JSON in place of tables.")

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.model is None):
            given = "neither" if self.preset is None else "both"
            raise ValueError(f"--preset and --model: {given} given; give one, such as --preset pb-granular-2b.")
        for name in ("gpu_memory", "bandwidth", "network_bandwidth", "tokens", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} {value} must be a number above 0.")
        if self.gpu not in (None, *SPEED_OF_GPU):
            raise ValueError(f"--gpu {self.gpu!r} is unknown: choose from {', '.join(SPEED_OF_GPU)}.")
        if self.engine == "single" and self.gpus > 1:
            raise ValueError(f"--engine single is one GPU, got --gpus {self.gpus}: leave it out, or name another.")
        self.setup()

    def setup(self) -> TrainingSetup:
        """The same for the arithmetic, with "single" for no engine. Raises ValueError."""
        allowed = REFERENCES.get(self.trainer, ("none",))
        reference = allowed[0] if self.reference is None else self.reference
        if reference not in allowed:
            raise ValueError(
                f"--reference {reference!r} with --trainer {self.trainer}: choose from {', '.join(allowed)}."
            )
        return TrainingSetup(
            engine=self.engine or "single",
            gpus=self.gpus,
            gpus_per_node=self.gpus_per_node,
            batch_size=self.batch_size,
            sequence_length=self.seq_length,
            accumulation=self.gradient_accumulation_steps,
            checkpointing=self.gradient_checkpointing,
            precision=self.precision,
            optimizer=self.optimizer,
            kernels=self.kernels,
            trainer=self.trainer,
            reference=reference,
            terms=self.terms if self.trainer == "surgery" else 1,
        )


ARGUMENTS = (PlanArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, compute, print."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt plan", description=__doc__)
    setup = args.setup()
    config = read_config(args.preset, args.model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and args.seq_length > longest:
        raise ValueError(
            f"--seq_length {args.seq_length} is longer than the {longest} positions of the model: choose at most that."
        )
    name = args.preset or args.model
    with reading(f"the configuration of {name!r}", keeps=(ValueError,)):
        size = measure_size(config, name)
        kept = measure_kept(config, setup.sequence_length, setup.precision, setup.kernels)
    plan = make_plan(
        size,
        kept,
        setup,
        engine=args.engine,
        gpu_gib=args.gpu_memory,
        gpu=args.gpu or ("h100" if args.gpu_memory <= 80 else "h200"),
        bandwidths=(args.bandwidth * 1e9, args.network_bandwidth * 1e9),
    )
    print((as_json if args.json else as_text)(plan, args.tokens, args.price_per_gpu_hour))


if __name__ == "__main__":
    run_script(main)
