"""Tokenise the text of a run of `hf-moe-cpt cpt` once, into a folder that any number of ranks and nodes read.

hf-moe-cpt tokenize --config five.yaml --tokenized_data /shared/five --dataset_num_proc 32
hf-moe-cpt cpt --config five.yaml --tokenized_data /shared/five

Options are those of cpt, so that one file serves both. Copies, held-out text and documents without text are dealt with
here; blocks are cut in the run, which reads the folder in place and refuses it for another tokenizer or other sources.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.continual import START
from hf_moe_cpt.reading import read_config
from hf_moe_cpt.trainers.cpt.cpt_data import write_tokenized


ARGUMENTS = START


def main(argv: Sequence[str] | None = None) -> None:
    """Tokenise, write, say what was written."""
    model, data, training, _ = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt tokenize", description=__doc__, defaults={"max_steps": 1}
    )
    if training.world_size > 1:
        raise ValueError("tokenize is started as one process, and --dataset_num_proc says how many it starts.")
    tokenizer, vocab_size = model.tokenizer(), 0
    if model.model_name_or_path is not None and training.vocabulary == "keep":
        options = {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
        vocab_size = read_config(model.model_name_or_path, **options).get_text_config().vocab_size
    print(write_tokenized(data, training, tokenizer, vocab_size or len(tokenizer)))
    print(f"written to {data.tokenized_data}: give cpt the same options.")


if __name__ == "__main__":
    run_script(main)
