"""Importing the package costs next to nothing, and what is not asked for is not loaded; each in a new process."""

from pathlib import Path

import pytest

import hf_moe_cpt
from tests.helpers.fresh_process import run_python


MOST_NEW_MODULES = 12  # 6 are loaded now, all small ones of ours
MOST_MODULES_OF_HELP = 200  # 119 now, of which 70 come with Python itself; transformers alone would load 1,500
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "trl", "triton", "liger_kernel", "peft")
LOAD = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert {"hf_moe_cpt", "hf_moe_cpt_low_memory"} <= set(ALL_EXPERTS_FUNCTIONS.keys())
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""
OURS = "<class 'hf_moe_cpt.modeling.modeling_cpt_moe.CptMoeForCausalLM'>"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    config = hf_moe_cpt.CptMoeConfig.from_preset("sb-granular-tiny", num_hidden_layers=1, vocab_size=64)
    hf_moe_cpt.CptMoeForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_after_transformers_it_adds_little() -> None:
    """Modules are counted, not seconds, which a busy machine decides."""
    program = (
        "import sys, transformers; known = set(sys.modules); import hf_moe_cpt; print(*(set(sys.modules) - known))"
    )
    new = run_python("-c", program).stdout.split()
    assert "hf_moe_cpt" in new and len(new) <= MOST_NEW_MODULES, new
    assert [name for name in new if not name.startswith("hf_moe_cpt")] == []


@pytest.mark.slow
def test_public_names_load_when_asked_for_and_no_extra_but_for_rainbowpo(checkpoint: str) -> None:
    program = (
        f"import sys; from transformers import AutoModelForCausalLM; import hf_moe_cpt{LOAD}"
        "names = [name for name in hf_moe_cpt.__all__ if not name.startswith('RainbowPO')]\n"
        "loaded = [getattr(hf_moe_cpt, name) for name in names]\n"
        "print([m for m in ('trl', 'liger_kernel', 'evaluate') if m in sys.modules])"
    )
    kind, extras = run_python("-c", program, checkpoint).stdout.splitlines()
    assert (kind, extras) == (OURS, "[]")


@pytest.mark.slow
def test_before_transformers_and_without_triton_one_name_loads_what_it_needs_and_its_old_place_warns(
    checkpoint,
) -> None:
    program = (
        "import sys; sys.modules['triton'], finders = None, list(sys.meta_path); import hf_moe_cpt\n"
        "assert sys.meta_path == finders  # no finder of ours is asked for modules of others\n"
        "from hf_moe_cpt.analysis import recovery_step, Mark\n"
        "print(recovery_step.__module__, Mark.__module__, 'transformers' in sys.modules)\n"
        "print([name for name in sys.modules if name.startswith('hf_moe_cpt.routing.')])\n"
        f"import hf_moe_cpt.kernels.experts_interface; from transformers import AutoModelForCausalLM{LOAD}"
    )
    done = run_python("-W", "default::DeprecationWarning", "-c", program, checkpoint)
    homes, routing, kind = done.stdout.splitlines()
    assert homes == "hf_moe_cpt.routing.metrics hf_moe_cpt.reports False"
    assert (routing, kind) == ("['hf_moe_cpt.routing.metrics']", OURS)
    assert "hf_moe_cpt.analysis is gone in the next release: import Mark from hf_moe_cpt.reports." in done.stderr


def test_help_loads_next_to_nothing() -> None:
    program = (
        "import contextlib, io, sys\nfrom hf_moe_cpt import cli\nsaid = io.StringIO()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):\n    cli.main(['--help'])\n"
        f"print('quickstart' in said.getvalue(), len(sys.modules), [m for m in {HEAVY} if m in sys.modules])"
    )
    said, count, heavy = run_python("-c", program).stdout.split(maxsplit=2)
    assert said == "True" and int(count) <= MOST_MODULES_OF_HELP and heavy.strip() == "[]"


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
