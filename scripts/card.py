"""Write the model card of a finished run: `hf-moe-cpt card FOLDER`.

hf-moe-cpt card olmoe-on-my-texts --dataset_name me/my-texts --license apache-2.0 --print

Every number of the card comes from the run's files; what no file tells (names of data sets, licence) is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.hub.cards import CardArguments, build_card, card_of_a_person, write_card
from hf_moe_cpt.hub.contents import CARD, check_checkpoint


@dataclass
class OutputArguments:
    """What is done with the card"""

    repository: str | None = HfArg(default=None, help="owner/name that the card tells people to load.")
    print: bool = HfArg(default=False, help="Print the card, write nothing.")
    overwrite: bool = HfArg(default=False, help="Replace a README.md that somebody wrote.")


ARGUMENTS = (CardArguments, OutputArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build the card, print or write it."""
    card, output = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt card", description=__doc__)
    check_checkpoint(card.folder, needs_tokenizer=False, needs_base=False)  # what it counts must be there
    told = card.told(output.repository)
    if output.print:
        print(build_card(card.folder, told, card.method).text)
        return
    if not output.overwrite and card_of_a_person(card.folder) is not None:
        raise ValueError(
            f"{str(Path(card.folder) / CARD)!r} was written by somebody: keep it, or replace it with --overwrite "
            "(--print only shows)."
        )
    print(write_card(card.folder, told, card.method))


if __name__ == "__main__":
    run_script(main)
