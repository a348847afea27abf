"""Every test runs offline, seeded, on one thread, with its own caches and with fresh memory full of NaN."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import random
import shutil
import tempfile


_CACHE_OF_THIS_RUN = None
if "HF_MOE_CPT_TEST_CACHE" not in os.environ:  # the first process makes it; the workers of xdist inherit it
    _CACHE_OF_THIS_RUN = tempfile.mkdtemp(prefix="hf_moe_cpt_tests_")
    os.environ["HF_MOE_CPT_TEST_CACHE"] = _CACHE_OF_THIS_RUN

# Before the libraries are imported, since they read these once.
os.environ["HF_HOME"] = os.environ["HF_MOE_CPT_TEST_CACHE"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported, which makes objects by the million and no garbage
# transformers and trl read every file of every installed package for it.
importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)

import dill  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402


if not torch.cuda.is_available():  # then kernels run in Triton's interpreter, which must be chosen before the import
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers.expert_layers import patch_language_once  # noqa: E402
from tests.helpers.fresh_memory import fill_fresh_memory_with_nan  # noqa: E402


torch.set_num_threads(1)
# datasets hashes a function at each map, and for that dill disassembles all that the function calls: once is enough.
dill.detect.nestedglobals = functools.cache(dill.detect.nestedglobals)
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_language_once()
# The same examples in every run, and as long as they take: a suite that passed once passes again.
unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # that one is a clock too
settings.register_profile("repeatable", derandomize=True, max_examples=25, **unhurried)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed formats the whole stack for each kind of device that is not there.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that our code allocates and forgets to write shows up as NaN instead of as a plausible number.

    Not in tests marked `compiles`: torch.compile keeps a list of torch's functions by identity, and fails on the real
    ones if it was made while others stood in their place.
    """
    if request.node.get_closest_marker("compiles"):
        torch.compiler.reset()
    else:
        fill_fresh_memory_with_nan(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason in the summary, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With --dist loadfile the tests of a file run in one process, and those of tests/hub: its servers start once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/hub" if nodeid.startswith("tests/hub/") else super()._split_scope(nodeid)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """All is imported now and stays: a collection of garbage, which runs make between models, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
    if _CACHE_OF_THIS_RUN is not None:
        shutil.rmtree(_CACHE_OF_THIS_RUN, ignore_errors=True)
