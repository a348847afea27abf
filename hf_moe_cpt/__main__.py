"""`python -m hf_moe_cpt <command> ...` is `hf-moe-cpt <command> ...`."""

import sys

from hf_moe_cpt.cli import main


if __name__ == "__main__":
    sys.exit(main())
