"""Importing the package costs next to nothing, and what a user does not ask for is not loaded."""

import time

import pytest

from tests.helpers.fresh_process import run_python


MAX_IMPORT_SECONDS = 0.3
MAX_HELP_SECONDS = 1.0
ATTEMPTS = 3  # on a busy machine the fastest one counts
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "trl", "triton", "liger_kernel", "peft")


@pytest.mark.parametrize(
    "before", ["import torch, transformers", "from transformers import AutoModelForCausalLM"], ids=["plain", "auto"]
)
def test_import_adds_little_to_transformers_and_torch(before: str) -> None:
    program = f"{before}; import time; s = time.perf_counter(); import hf_moe_cpt; print(time.perf_counter() - s)"
    assert any(float(run_python("-c", program).stdout) < MAX_IMPORT_SECONDS for _ in range(ATTEMPTS))


def test_help_answers_within_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert "quickstart" in run_python("-m", "hf_moe_cpt.cli", "--help").stdout
        return time.perf_counter() - start

    assert any(seconds() < MAX_HELP_SECONDS for _ in range(ATTEMPTS))


def test_package_and_command_load_nothing_heavy() -> None:
    program = f"import sys, hf_moe_cpt, hf_moe_cpt.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python("-c", program).stdout.strip() == "[]"


def test_public_names_load_when_asked_for_and_without_the_extras() -> None:
    program = (
        "import sys, hf_moe_cpt\n"
        "names = [name for name in hf_moe_cpt.__all__ if not name.startswith('RainbowPO')]\n"
        "loaded = [getattr(hf_moe_cpt, name) for name in names]\n"
        "print([m for m in ('trl', 'liger_kernel', 'evaluate') if m in sys.modules])"
    )
    assert run_python("-c", program).stdout.strip() == "[]"


def test_a_name_that_needs_an_extra_says_so_where_it_is_missing() -> None:
    program = (
        "import sys; sys.modules['trl'] = None\n"
        "from hf_moe_cpt import cli\n"
        "try:\n    from hf_moe_cpt import RainbowPOTrainer\n"
        "except ImportError as error:\n    print(error)\n"
        "print(cli.main(['rainbowpo', '--dataset_name', 'pairs']))"
    )
    done = run_python("-c", program)
    remedy = "needs the package trl, which is not installed: pip install 'hf_moe_cpt[rainbowpo]'."
    assert done.stdout.splitlines() == [f"RainbowPOTrainer {remedy}", "2"]
    assert done.stderr.strip() == f"error: ImportError: hf-moe-cpt rainbowpo {remedy}"
