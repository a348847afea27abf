"""The smallest bench with its tokenizer, and made-up measurements of three models."""

import pytest

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from tests.helpers.surgery_raws import surgery_raw


@pytest.fixture(scope="package")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(0, 15, kinds=("person",), forms=("quiz",))


@pytest.fixture(scope="package")
def tokenizer(bench):
    return train_byte_level_bpe(bench.before_corpus()["text"], 400, progress=False)


@pytest.fixture(scope="package")
def raws() -> dict:
    return {"before": surgery_raw(0, 2.0, False), "after": surgery_raw(1, 0.4), "retrained": surgery_raw(2)}
