"""Publish a finished folder: `hf-moe-cpt push FOLDER OWNER/NAME`.

hf-moe-cpt push olmoe-on-my-texts me/olmoe-on-my-texts --private --dry_run

The folder is checked first and nothing in it is changed. It is published in one commit; after an interruption the same
command goes on. A README.md that somebody wrote is published as it is, any other is made from the run's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.hub.cards import Card, CardArguments, card_to_publish
from hf_moe_cpt.hub.folder import CARD
from hf_moe_cpt.hub.publishing import Upload, plan_upload, publish


@dataclass
class PushArguments:
    """Where it goes"""

    repository: str = HfArg(metadata={"positional": True}, help="owner/name on the Hub; made if it does not exist.")
    private: bool = HfArg(default=False, help="If the repository is new, only you can see it.")
    revision: str | None = HfArg(default=None, help="Branch to publish to; made if it does not exist.")
    commit_message: str = HfArg(default="Upload model with hf_moe_cpt", help="Message of the commit.")
    without_tokenizer: bool = HfArg(default=False, help="Publish a folder that has no tokenizer.")
    dry_run: bool = HfArg(default=False, help="Check, print files and card, publish nothing.")


ARGUMENTS = (CardArguments, PushArguments)


def describe(upload: Upload, repository: str) -> str:
    """Every file with its size, then the card."""
    sizes = upload.sizes()
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files, to {repository}"
    return "\n".join([*lines, total, "", f"---- {CARD} ----", upload.card])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, then print or publish."""
    card, push = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt push", description=__doc__)
    plan_upload(card.folder, Card("", {}), not push.without_tokenizer)  # a wrong folder is told before the card
    made = card_to_publish(card.folder, card.told(push.repository), card.method)
    upload = plan_upload(card.folder, made, not push.without_tokenizer)
    if push.dry_run:
        print(describe(upload, push.repository))
        return
    address = publish(
        upload, push.repository, private=push.private, revision=push.revision, message=push.commit_message
    )
    print(f"published {len(upload.sizes())} files: {address}")


if __name__ == "__main__":
    run_script(main)
