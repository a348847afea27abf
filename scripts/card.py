"""Write the model card of a finished run: `hf-moe-cpt card FOLDER`.

hf-moe-cpt card olmoe-on-my-texts --dataset_name me/my-texts --license apache-2.0 --print

Every number of the card comes from the run's files; what no file tells (names of data sets, licence) is said here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_moe_cpt.hub.cards import Told, build_card, is_generated, write_card
from hf_moe_cpt.hub.publishing import CARD
from hf_moe_cpt.hub.run_facts import METHODS


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of what no file of a run tells."""
    parser.add_argument("folder", help="folder of a saved model")
    parser.add_argument("--method", choices=METHODS, help="what made the model, if the folder does not say")
    parser.add_argument("--dataset_name", nargs="+", default=[], help="what it was trained on: Hub ids, or names")
    parser.add_argument(
        "--base_model", help="Hub id of the model that it was made from, if the run had a copy on disk"
    )
    parser.add_argument("--license", help="identifier of the licence, such as apache-2.0")
    parser.add_argument("--language", nargs="+", default=[], help="codes of languages, such as en de")
    parser.add_argument("--title", help="title of the card; by default the name of the repository or folder")


def told_by(options: argparse.Namespace, repository: str | None) -> Told:
    """What the command line says, for the card."""
    return Told(
        repository=repository,
        datasets=options.dataset_name,
        license=options.license,
        language=options.language,
        base_model=options.base_model,
        title=options.title,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build the card, print or write it."""
    parser = argparse.ArgumentParser(
        prog="hf-moe-cpt card", description="Write the model card of a finished run.", allow_abbrev=False
    )
    add_card_arguments(parser)
    parser.add_argument("--repository", help="owner/name that the card tells people to load")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the card, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that somebody wrote")
    options = parser.parse_args(argv)
    told = told_by(options, options.repository)
    if options.only_print:
        print(build_card(options.folder, told, options.method).text)
        return
    path = Path(options.folder) / CARD
    if path.is_file() and not options.overwrite and not is_generated(path.read_text(encoding="utf-8")):
        raise ValueError(
            f"{str(path)!r} was written by somebody: keep it, or replace it with --overwrite (--print only shows)."
        )
    print(write_card(options.folder, told, options.method))


if __name__ == "__main__":
    main()
