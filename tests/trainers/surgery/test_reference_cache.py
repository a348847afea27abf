"""The states on disk: found again, never those of another model or other rows, whole after a kill, and in shares."""

import json
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hf_moe_cpt.trainers.surgery import reference_cache
from hf_moe_cpt.trainers.surgery.model_pass import run_model
from hf_moe_cpt.trainers.surgery.reference import build_reference
from hf_moe_cpt.trainers.surgery.reference_cache import weights_fingerprint
from hf_moe_cpt.trainers.surgery.set_mixture import collate_rows
from tests.helpers.fresh_process import TWO_RANKS, launch
from tests.helpers.tiny_models import tiny_model, tokenized


ROWS = tokenized(20, 3)["input_ids"][:]
BYTES_OF_ROW = 20 * 16 * 4  # about: tokens times hidden size times float32


def _build(folder, model=None, rows=ROWS, name="retain", **options):
    model = tiny_model("llama") if model is None else model
    return build_reference("cache", model, {name: rows}, Accelerator(cpu=True), folder, batch_size=3, **options)


def _batch(*places, rows=ROWS):
    return collate_rows(
        [{"input_ids": rows[p], "completion_mask": [True] * len(rows[p]), "row": p} for p in places], pad_token_id=0
    )


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of about four rows."""
    monkeypatch.setattr(reference_cache, "SHARD_BYTES", 4 * BYTES_OF_ROW)


@pytest.fixture
def passes(monkeypatch):
    """How many rows went through the model so far, the probe of two tokens left out."""
    seen = []
    plain = reference_cache._padded
    monkeypatch.setattr(
        reference_cache, "_padded", lambda tokens, device: seen.append(len(tokens)) or plain(tokens, device)
    )
    return seen


@pytest.mark.usefixtures("small_shards")
def test_every_row_is_found_whatever_its_shard(tmp_path):
    found, model = _build(tmp_path), tiny_model("llama").eval()
    assert len(list(tmp_path.rglob("states-*.safetensors"))) == len(found.states["retain"].shards) > 3
    for places in ((19, 0, 7), (5,), (3, 3)):
        batch = _batch(*places)
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            want = run_model(model, batch).hidden
        got = found.hidden(batch, "retain")
        assert got.dtype == want.dtype and not got[~mask].any()
        assert torch.allclose(got[mask], want[mask], atol=1e-6)


@pytest.mark.usefixtures("small_shards")
def test_a_second_run_computes_nothing_and_a_killed_one_goes_on(tmp_path, passes):
    whole = _build(tmp_path / "whole")
    assert sum(passes) == 20
    _build(tmp_path / "whole")
    assert sum(passes) == 20
    number = 2
    states = whole.states["retain"]
    (states.folder / f".states-{number:05d}.safetensors.partial").write_bytes(b"half of it")
    states._path(number).unlink()
    again = _build(tmp_path / "whole")
    assert sum(passes) == 20 + len(states.shards[number])
    assert not list(states.folder.glob(".*")) and not again.states["retain"].missing()


def test_another_model_and_other_rows_have_a_cache_of_their_own(tmp_path, passes):
    _build(tmp_path)
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    other_rows = [[*ROWS[0][:-1], ROWS[0][-1] % 40 + 1], *ROWS[1:]]
    cut = [ROWS[0] + ROWS[1][:1], ROWS[1][1:], *ROWS[2:]]  # the same tokens in rows of other lengths
    for options in (
        {"model": changed},
        {"rows": other_rows},
        {"rows": cut},
        {"model": tiny_model("llama", rms_norm_eps=1e-3)},
    ):
        before = sum(passes)
        found = _build(tmp_path, **options)
        assert sum(passes) == before + 20
        with torch.no_grad():
            batch = _batch(0, 3, rows=options.get("rows", ROWS))
            want = run_model(options.get("model", tiny_model("llama")).eval(), batch).hidden
        mask = batch["attention_mask"].bool()
        assert torch.allclose(found.hidden(batch, "retain")[mask], want[mask], atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "other key", "other rows"])
def test_a_damaged_shard_is_made_anew(tmp_path, passes, caplog, damage):
    found = _build(tmp_path)
    path = found.states["retain"]._path(0)
    want = load_file(path)["hidden"].clone()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        key = found.states["retain"].key if damage == "other rows" else "0" * 32
        save_file({"hidden": torch.zeros_like(want)[: None if damage == "other key" else -1]}, path, {"key": key})
    _build(tmp_path)
    assert sum(passes) == 40 and "it is made anew" in caplog.text
    assert torch.equal(load_file(path)["hidden"], want)


def test_batches_of_other_rows_are_refused(tmp_path):
    found = _build(tmp_path)
    wrong = _batch(0, 1)
    wrong["row"] = [0, 2]
    with pytest.raises(ValueError, match="Row 2 of a batch does not hold the tokens that retain-"):
        found.hidden(wrong, "retain")
    wrong["row"] = [0, 99]
    with pytest.raises(ValueError, match="Row 99 of a batch"):
        found.hidden(wrong, "retain")
    with pytest.raises(ValueError, match="without `row`"):
        found.hidden({name: wrong[name] for name in ("input_ids", "attention_mask")}, "retain")
    with pytest.raises(ValueError, match="The reference cache holds retain, not neighbour"):
        found.hidden(_batch(0), "neighbour")


def test_a_full_disk_is_noticed_before_anything_is_computed(tmp_path, monkeypatch, passes):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(reference_cache.shutil, "disk_usage", lambda _: usage(10**6, 0, 10_000))
    with pytest.raises(ValueError, match="needs 0.00 GB and .* has 0.00 GB free: free space, set reference_cache_dir"):
        _build(tmp_path / "new" / "folder")
    assert not passes and not (tmp_path / "new").exists()
    needed = sum(len(row) for row in ROWS) * 16 * 4
    monkeypatch.setattr(reference_cache.shutil, "disk_usage", lambda _: usage(10**6, 0, needed))
    _build(tmp_path / "new" / "folder")


def test_the_fingerprint_is_that_of_what_decides_the_states():
    model = tiny_model("mixtral")
    before = weights_fingerprint(model)
    model.config.use_cache, model.config.output_router_logits = False, True
    assert weights_fingerprint(model.train()) == before
    assert weights_fingerprint(model.to(torch.bfloat16)) != before
    assert weights_fingerprint(tiny_model("mixtral", num_experts_per_tok=1)) != before


@pytest.mark.slow
def test_two_ranks_share_the_work_and_read_all(tmp_path):
    want = _build(tmp_path / "one").states["retain"]
    launch(*TWO_RANKS, "-m", "tests.trainers.surgery.test_reference_cache", str(tmp_path / "two"))
    found = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    whole = torch.cat([want.read("hidden", _batch(place))[0] for place in range(20)])
    assert found[0]["written"] and found[1]["written"] and not set(found[0]["written"]) & set(found[1]["written"])
    for rank in found:
        assert torch.allclose(torch.tensor(rank["states"]), whole, atol=1e-6)


def main(folder: Path) -> None:
    """Fill the cache as one of several ranks; leave what was written and what can be read."""
    reference_cache.SHARD_BYTES = 4 * BYTES_OF_ROW
    written, plain = [], reference_cache.RowStates.write

    def write(self, shard, states):
        written.append(shard)
        plain(self, shard, states)

    reference_cache.RowStates.write = write
    found = _build(folder).states["retain"]
    states = torch.cat([found.read("hidden", _batch(place))[0] for place in range(20)]).tolist()
    rank = Accelerator(cpu=True).process_index
    folder.with_name(f"{folder.name}-{rank}.json").write_text(json.dumps({"written": written, "states": states}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
