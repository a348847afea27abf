"""Text on disk and a tokenizer for it, as a user of the scripts has them."""

import json
from pathlib import Path

import pytest

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe


@pytest.fixture(scope="package")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with new.jsonl, old/*.txt and tokenizer/."""
    folder = tmp_path_factory.mktemp("texts")
    new = [f"def f_{i}(x):\n    return x * {i} + {i % 7}\n" * 4 for i in range(60)]
    old = [f"Once upon a time there were {i} little pigs and {i % 5} wolves. " * 4 for i in range(60)]
    (folder / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in new))
    (folder / "old").mkdir()
    for i, text in enumerate(old):
        (folder / "old" / f"{i}.txt").write_text(text)
    train_byte_level_bpe(new + old, 400, progress=False).save_pretrained(folder / "tokenizer")
    return folder
