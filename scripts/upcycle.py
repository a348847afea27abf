"""Make a mixture of experts out of a dense checkpoint, or a larger one out of a mixture of cpt_moe.

hf-moe-cpt upcycle my-llama --to granular --output_dir my-moe
hf-moe-cpt upcycle my-moe --split 2 --output_dir my-finer-moe

The result computes at step 0 what the model computed, or close to it; docs/upcycle.md says when. Memory holds a
shard at a time, and the output folder appears whole or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.hub.checkpoint_io import MAX_SHARD_SIZE
from hf_moe_cpt.hub.upcycle import ROUTER_INITS, TARGETS, UpcycleOptions, first_block_error, grow, upcycle


@dataclass
class UpcycleArguments:
    """What is made, of what"""

    dense: str = HfArg(metadata={"positional": True}, help="A checkpoint in safetensors: a folder, or a Hub id.")
    output_dir: str = HfArg(help="A new or empty folder.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit, if DENSE is a Hub id.")
    to: str = HfArg(
        default="granular", help=f"{', '.join(TARGETS)}, or a JSON file of CptMoeConfig fields of the mixture."
    )
    split: int = HfArg(
        default=1,
        metadata={"range": "[1, 65536]"},
        help="Of a mixture: into how many parts each expert is cut; E and K grow as much.",
    )
    copies: int = HfArg(
        default=1,
        metadata={"range": "[1, 65536]"},
        help="Of a mixture: how often each expert comes; E and K grow as much.",
    )
    max_shard_size: str = HfArg(default=MAX_SHARD_SIZE, help="Of the files written, such as 2GB.")


@dataclass
class MixtureArguments:
    """What the mixture has, instead of what --to says"""

    num_experts: int | None = HfArg(default=None, help="Routed experts of a layer.")
    num_experts_per_tok: int | None = HfArg(default=None, help="Experts that a token goes to.")
    num_shared_experts: int | None = HfArg(default=None, help="Experts that every token goes to.")
    moe_intermediate_size: int | None = HfArg(default=None, help="Width of an expert.")
    norm_topk_prob: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Normalise gates, by default where K > 1: the function is kept exactly.",
    )


@dataclass
class StartArguments:
    """How experts and routers start"""

    router_init: str = HfArg(
        default="noise", metadata={"choices": list(ROUTER_INITS)}, help="Of the routers' weights."
    )
    router_std: float | None = HfArg(default=None, help="Of the logits that noise gives; docs/upcycle.md on defaults.")
    expert_noise: float = HfArg(default=0.0, help="Added to routed experts, in standard deviations of a matrix.")
    drop_ratio: float = HfArg(default=0.0, help="Share of each expert's width that is drawn anew; paper: 0.5.")
    seed: int = HfArg(default=0, help="Of everything random.")


ARGUMENTS = (UpcycleArguments, MixtureArguments, StartArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Upcycle and say what came out."""
    args, mixture, start = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt upcycle", description=__doc__)
    overrides = {name: value for name, value in vars(mixture).items() if value is not None}
    options = UpcycleOptions(**vars(start))
    how = {"options": options, "max_shard_size": args.max_shard_size, "revision": args.revision}
    if args.split > 1 or args.copies > 1:
        if overrides:
            raise ValueError(
                f"--{next(iter(overrides))} is for dense models: --split and --copies say what a mixture gets."
            )
        made = grow(args.dense, args.output_dir, args.split, args.copies, **how)
    else:
        made = upcycle(args.dense, args.output_dir, args.to, **how, **overrides)
    layout, config = made.layout, made.config
    kind = "copies" if layout.num_parts == 1 else f"parts (1 of {layout.num_parts})"
    print(
        f"{made.folder}: {made.num_parameters / 1e6:.1f}M parameters; {config.num_experts} experts, "
        f"{config.num_experts_per_tok} per token, {config.num_shared_experts} shared, {kind} of the dense block"
    )
    error = first_block_error(args.dense, made, args.revision)
    print(f"function at step 0: {made.function}; measured in the first layer: relative error {error:.1e}")
    for path in made.leftovers:
        print(f"an earlier run was killed and left {path}: delete it", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
