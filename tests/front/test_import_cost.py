"""Importing the package costs next to nothing, and what a user does not ask for is not loaded."""

from tests.helpers.fresh_process import run_python


MOST_NEW_MODULES = 12  # 6 are loaded now, all small ones of ours
MOST_MODULES_OF_HELP = 200  # 119 now, of which 70 come with Python itself; transformers alone would load 1,500
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "trl", "triton", "liger_kernel", "peft")


def test_import_adds_little_to_transformers_and_public_names_load_when_asked_for() -> None:
    """Modules are counted, not seconds, which a busy machine decides. No extra is needed but for RainbowPO."""
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "known = set(sys.modules); import hf_moe_cpt; print(*(set(sys.modules) - known))\n"
        "names = [name for name in hf_moe_cpt.__all__ if not name.startswith('RainbowPO')]\n"
        "loaded = [getattr(hf_moe_cpt, name) for name in names]\n"
        "print([m for m in ('trl', 'liger_kernel', 'evaluate') if m in sys.modules])"
    )
    added, extras = run_python("-c", program).stdout.splitlines()
    new = added.split()
    assert "hf_moe_cpt" in new and len(new) <= MOST_NEW_MODULES, new
    assert [name for name in new if not name.startswith("hf_moe_cpt")] == []
    assert extras == "[]"


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
