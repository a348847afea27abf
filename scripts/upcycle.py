"""Make a mixture of experts out of a dense checkpoint.

python scripts/upcycle.py my-llama --to granular --output_dir my-moe

The result computes at step 0 what the dense model computed, or close to it; docs/upcycle.md says when. Memory holds a
shard at a time, and the output folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_moe_cpt.hub.streaming_output import MAX_SHARD_SIZE
from hf_moe_cpt.hub.upcycle import TARGETS, upcycle
from hf_moe_cpt.hub.upcycle_layout import ROUTER_INITS
from hf_moe_cpt.hub.upcycle_weights import UpcycleOptions
from hf_moe_cpt.scripts.benchmark_tools import run_script


NUMBERS = ("num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-moe-cpt upcycle", description=__doc__.split("\n", 1)[0])
    parser.add_argument("dense", metavar="DENSE", help="a dense checkpoint in safetensors: a folder, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit, if DENSE is a Hub id")
    parser.add_argument(
        "--to", default="granular", help=f"{', '.join(TARGETS)}, or a JSON file of CptMoeConfig fields of the mixture"
    )
    parser.add_argument("--output_dir", required=True, help="a new or empty folder")
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, help="instead of what --to says")
    parser.add_argument(
        "--norm_topk_prob", action="store_true", default=None, help="normalise gates: the function is kept exactly"
    )
    parser.add_argument("--router_init", default="noise", choices=ROUTER_INITS, help="of the routers' weights")
    parser.add_argument("--router_std", type=float, help="of the logits that noise gives; docs/upcycle.md on defaults")
    parser.add_argument(
        "--expert_noise", type=float, default=0.0, help="added to routed experts, in standard deviations of a matrix"
    )
    parser.add_argument(
        "--drop_ratio", type=float, default=0.0, help="share of each expert's width that is drawn anew; paper: 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="of the files written, such as 2GB")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Upcycle and say what came out."""
    args = _parser().parse_args(argv)
    names = (*NUMBERS, "norm_topk_prob")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = UpcycleOptions(args.router_init, args.router_std, args.expert_noise, args.drop_ratio, args.seed)
    made = upcycle(args.dense, args.output_dir, args.to, options, args.max_shard_size, args.revision, **overrides)
    layout, config = made.layout, made.config
    kind = "copies" if layout.num_parts == 1 else f"parts (1 of {layout.num_parts})"
    print(
        f"{made.folder}: {made.num_parameters / 1e6:.1f}M parameters; {config.num_experts} experts, "
        f"{config.num_experts_per_tok} per token, {config.num_shared_experts} shared, {kind} of the dense block"
    )
    print(f"function at step 0: {made.function}")
    for path in made.leftovers:
        print(f"an earlier run was killed and left {path}: delete it", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
