"""Publish a finished folder: `hf-moe-cpt push FOLDER OWNER/NAME`.

hf-moe-cpt push olmoe-on-my-texts me/olmoe-on-my-texts --private --dry_run

The folder is checked first and nothing in it is changed. It is published in one commit; after an interruption the same
command goes on. A README.md that somebody wrote is published as it is, any other is made from the run's files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_moe_cpt.hub.cards import Card, build_card, check_metadata, is_generated
from hf_moe_cpt.hub.publishing import CARD, Upload, plan_upload, publish
from hf_moe_cpt.scripts.card import add_card_arguments, told_by


def card_to_publish(options: argparse.Namespace) -> Card:
    """The README.md of the folder if a person wrote it, else a new one."""
    path = Path(options.folder) / CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if not is_generated(text):
            check_metadata(text)
            return Card(text, {})
    return build_card(options.folder, told_by(options, options.repository), options.method)


def describe(upload: Upload, repository: str) -> str:
    """Every file with its size, then the card."""
    sizes = upload.sizes()
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files, to {repository}"
    return "\n".join([*lines, total, "", f"---- {CARD} ----", upload.card])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, then print or publish."""
    parser = argparse.ArgumentParser(
        prog="hf-moe-cpt push", description="Publish a finished folder on the Hub.", allow_abbrev=False
    )
    add_card_arguments(parser)
    parser.add_argument("repository", help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository is new, only you can see it")
    parser.add_argument("--revision", help="branch to publish to; made if it does not exist")
    parser.add_argument("--commit_message", default="Upload model with hf_moe_cpt", help="message of the commit")
    parser.add_argument("--without_tokenizer", action="store_true", help="publish a folder that has no tokenizer")
    parser.add_argument("--dry_run", action="store_true", help="check, print files and card, publish nothing")
    options = parser.parse_args(argv)
    plan_upload(options.folder, Card("", {}), not options.without_tokenizer)  # a wrong folder is told before the card
    upload = plan_upload(options.folder, card_to_publish(options), not options.without_tokenizer)
    if options.dry_run:
        print(describe(upload, options.repository))
        return
    address = publish(
        upload,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.commit_message,
    )
    print(f"published {len(upload.sizes())} files: {address}")


if __name__ == "__main__":
    main()
