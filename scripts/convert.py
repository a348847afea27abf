"""Write a mixture-of-experts checkpoint as one of another family, with the same logits.

hf-moe-cpt convert my-moe --to qwen2_moe --output_dir my-qwen2-moe

One side is cpt_moe, the other mixtral, olmoe, qwen2_moe or qwen3_moe; to glm4_moe, llama, mistral, qwen2 and qwen3
there is no way back. What the other family cannot compute is refused before anything is written; docs/convert.md lists
what fits, docs/serving.md what other tools do with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.hub.checkpoint_io import MAX_SHARD_SIZE
from hf_moe_cpt.hub.convert import TARGETS, convert


@dataclass
class ConvertArguments:
    """What is written where"""

    source: str = HfArg(metadata={"positional": True}, help="A checkpoint in safetensors: a folder, or a Hub id.")
    to: str = HfArg(metadata={"choices": list(TARGETS)}, help="The family to convert to.")
    output_dir: str = HfArg(help="A new or empty folder.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit, if SOURCE is a Hub id.")
    max_shard_size: str = HfArg(default=MAX_SHARD_SIZE, help="Of the files written, such as 2GB.")


ARGUMENTS = (ConvertArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert and say what came out."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt convert", description=__doc__)
    made = convert(args.source, args.output_dir, args.to, args.max_shard_size, args.revision)
    print(f"{made.folder}: {made.config.model_type}, the same logits")
    for note in made.notes:
        print(f"trained further, it differs: {note}")
    for obstacle in made.obstacles:
        print(f"not right in every server: {obstacle}")
    for path in made.leftovers:
        print(f"an earlier run was killed and left {path}: delete it", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
