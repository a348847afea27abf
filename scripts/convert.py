"""Write a mixture-of-experts checkpoint as one of another family, with the same logits.

python scripts/convert.py my-moe --to qwen2_moe --output_dir my-qwen2-moe

One side is cpt_moe, the other mixtral, olmoe, qwen2_moe or qwen3_moe. What the other family cannot compute is refused
before anything is written; docs/convert.md lists what fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_moe_cpt.hub.convert import MODEL_TYPES, convert
from hf_moe_cpt.hub.streaming_output import MAX_SHARD_SIZE
from hf_moe_cpt.scripts.benchmark_tools import run_script


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-moe-cpt convert", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", metavar="PATH", help="a checkpoint in safetensors: a folder, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit, if PATH is a Hub id")
    parser.add_argument("--to", required=True, choices=MODEL_TYPES, help="the family to convert to")
    parser.add_argument("--output_dir", required=True, help="a new or empty folder")
    parser.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="of the files written, such as 2GB")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert and say what came out."""
    args = _parser().parse_args(argv)
    made = convert(args.source, args.output_dir, args.to, args.max_shard_size, args.revision)
    print(f"{made.folder}: {made.config.model_type}, the same logits")
    for note in made.notes:
        print(f"trained further, it differs: {note}")
    for path in made.leftovers:
        print(f"an earlier run was killed and left {path}: delete it", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
