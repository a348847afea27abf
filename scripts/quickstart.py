"""See the three operations in minutes: one small model is taught, aligned, operated and published; a page tells it.

The text is the Python installation's own (docs/corpus.md), or yours with --data-dir. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.quickstart import QuickstartArguments, run_quickstart


ARGUMENTS = (QuickstartArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print the table and where things are."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt quickstart", description=__doc__)
    print(run_quickstart(args))


if __name__ == "__main__":
    run_script(main)
