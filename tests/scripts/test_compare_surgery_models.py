"""What the models of a cell read, in which order, and that training from it can be repeated."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_moe_cpt.data.surgery_bench import BEFORE_SETS, RETRAINED_SETS
from hf_moe_cpt.data.tokenizer_training import train_byte_level_bpe
from hf_moe_cpt.scripts import compare_surgery_models
from hf_moe_cpt.scripts.compare_surgery_models import (
    make_bench,
    make_material,
    padded,
    rate_share,
    reading_order,
    token_rows,
    train_model,
)
from hf_moe_cpt.scripts.compare_surgery_plan import BEFORE, RETRAINED, SETTINGS, Comparison, Run


MINIATURE = replace(
    SETTINGS["small"],
    subjects=3,
    forms=("quiz",),
    vocab_size=320,
    max_length=32,
    epochs=1,
    batch_size=16,
    models={
        "llama": {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1},
        "cpt_moe": {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        | {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1, "moe_intermediate_size": 4},
    },
)


def test_every_row_is_read_in_every_epoch_and_real_text_once():
    scale = replace(MINIATURE, epochs=3, batch_size=4)
    rows = [[place] * (2 + place % 5) for place in range(10)]
    real = [[100 + place] * 3 for place in range(7)]
    batches = list(reading_order(rows, real, scale, seed=1))
    read = Counter(row[0] for batch in batches for row in batch)
    assert read == Counter({place: 3 for place in range(10)} | {100 + place: 1 for place in range(7)})
    assert max(map(len, batches)) == 4 and batches != list(reading_order(rows, real, scale, seed=2))
    assert list(reading_order(rows, [], scale, seed=1)) == list(reading_order(rows, [], scale, seed=1))


def test_texts_become_rows_with_an_end_and_batches_with_masked_padding():
    tokenizer = train_byte_level_bpe(["abcdefgh"], 258, progress=False)
    rows = token_rows(tokenizer, ["abcde", "abc"], max_length=4)
    letters = tokenizer("abcde")["input_ids"]
    assert rows == [letters[:4], [letters[4], 0], [*letters[:3], 0]]
    assert token_rows(tokenizer, ["abcd"], max_length=4) == [letters[:4]]  # the end alone teaches nothing
    batch = padded([[5, 6, 7], [8, 0]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 0, -100]]


def test_rate_goes_up_and_down():
    shares = [rate_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[10] == 1.0
    assert shares[-1] == 0.02 and shares[55] == pytest.approx(0.5)


def test_hubs_can_be_left_out():
    bench = make_bench(MINIATURE, seed=1)
    assert set(bench.documents["retain"]["subject_kind"]) == {"person"} and len(bench.documents["retain"]) == 3
    assert set(bench.ask("retain")["subject_kind"]) == {"person"} and len(bench.ask("retain", kind="mcq")) == 24
    assert "city" in make_bench(replace(MINIATURE, keep_hubs=True), seed=1).documents["retain"]["subject_kind"]


@pytest.mark.parametrize("architecture", ["llama", "cpt_moe"])
def test_training_can_be_repeated_and_reads_the_sets_of_each_model(architecture, tmp_path, monkeypatch):
    material = make_material(MINIATURE, 1, tmp_path)
    comparison = Comparison("small", MINIATURE, "cpu")
    read = {RETRAINED: [], BEFORE: []}
    models = {}
    for name, rows_read in read.items():
        monkeypatch.setattr(compare_surgery_models, "padded", partial(_recorded, rows_read))
        models[name] = train_model(comparison, Run(name, architecture, 1), material)
    for name, sets in ((RETRAINED, RETRAINED_SETS), (BEFORE, BEFORE_SETS)):
        assert sorted(read[name]) == sorted(row for of_set in sets for row in _rows_of(material, of_set))
    again = train_model(comparison, Run(BEFORE, architecture, 1), material)
    for (name, weight), other in zip(models[BEFORE].named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert not torch.equal(models[BEFORE].lm_head.weight, models[RETRAINED].lm_head.weight)


def _recorded(into: list, rows: list, device: torch.device) -> dict:
    into.extend(rows)
    return padded(rows, device)


def _rows_of(material, name: str) -> list[list[int]]:
    return token_rows(material.tokenizer, list(material.bench.documents[name]["text"]), MINIATURE.max_length)


def test_real_text_is_kept_beside_the_retain_set(tmp_path, monkeypatch):
    assert make_material(MINIATURE, 1, tmp_path).retained() is not None
    rows = [{"text": f"real text number {place}"} for place in range(3)]
    table = compare_surgery_models.datasets.Dataset.from_list(rows)
    monkeypatch.setattr(
        compare_surgery_models,
        "build_python_corpus",
        lambda **options: {"prose": {"train": table, "held_out": table}} if options["cache_dir"] == tmp_path else None,
    )
    material = make_material(replace(MINIATURE, real_characters=100), 1, tmp_path)
    retained = material.retained()
    assert list(retained["text"])[-3:] == [row["text"] for row in rows] and len(retained) == 6
