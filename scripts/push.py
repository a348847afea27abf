"""Publish a finished folder: `hf-moe-cpt push FOLDER OWNER/NAME`.

hf-moe-cpt push olmoe-on-my-texts me/olmoe-on-my-texts --private --dry_run

The folder is checked first and nothing in it is changed. Published is what a model needs and what its card tells:
weights, configurations, tokenizer, code, card, plots, facts of the run; all else is named and stays at home, unless
--include names it. It goes in one commit; after an interruption the same command goes on. A README.md that somebody
wrote is published as it is, but for paths of this machine; any other is made from the run's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.hub.cards import CardArguments, card_to_publish
from hf_moe_cpt.hub.contents import CARD
from hf_moe_cpt.hub.publishing import Upload, plan_upload, publish, require_name


@dataclass
class PushArguments:
    """Where it goes"""

    repository: str = HfArg(metadata={"positional": True}, help="owner/name on the Hub; made if it does not exist.")
    private: bool = HfArg(default=False, help="If the repository is new, only you can see it.")
    revision: str | None = HfArg(default=None, help="Branch to publish to; made if it does not exist.")
    commit_message: str = HfArg(default="Upload model with hf_moe_cpt", help="Message of the commit.")
    without_tokenizer: bool = HfArg(default=False, help="Publish a folder that has no tokenizer.")
    include: list[str] = HfArg(default_factory=list, help="Further files to publish, by their path below the folder.")
    dry_run: bool = HfArg(default=False, help="Check, print files and card, publish nothing.")


ARGUMENTS = (CardArguments, PushArguments)


def describe(upload: Upload, repository: str) -> str:
    """Every file with its size, what stays at home, then the card."""
    sizes = upload.sizes()
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    total = f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files, to {repository}"
    return "\n".join([*lines, total, *left_at_home(upload), "", f"---- {CARD} ----", upload.card])


def left_at_home(upload: Upload) -> list[str]:
    """A line for each file that is not published, or for the folder that it lies in."""
    kept = {name.partition("/")[0] for name in [*upload.weights, *upload.texts] if "/" in name}
    by_place: dict[str, list[str]] = {}
    for name in upload.left:
        top, slash, _ = name.partition("/")
        by_place.setdefault(top + slash if top not in kept else name, []).append(name)
    return [
        f"left at home: {place!r} ({f'{len(names)} files' if place.endswith('/') else upload.left[names[0]]})"
        for place, names in by_place.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, then print or publish."""
    card, push = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt push", description=__doc__)
    require_name(push.repository)
    upload = plan_upload(card.folder, needs_tokenizer=not push.without_tokenizer, include=push.include)
    upload = upload.with_card(card_to_publish(card.folder, card.told(push.repository), card.method))
    if push.dry_run:
        print(describe(upload, push.repository))
        return
    address = publish(
        upload, push.repository, private=push.private, revision=push.revision, message=push.commit_message
    )
    print(*left_at_home(upload), f"published {len(upload.sizes())} files: {address}", sep="\n")


if __name__ == "__main__":
    run_script(main)
