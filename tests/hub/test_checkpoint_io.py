"""Checkpoints are rewritten in little memory, whole or not at all; damage is named, the source stays untouched."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe_cpt.hub import checkpoint_io
from hf_moe_cpt.hub.checkpoint_io import CheckpointReader, PlannedTensor, copied
from hf_moe_cpt.hub.upcycle import UpcycleOptions, upcycle
from hf_moe_cpt.reading import INDEX
from tests.helpers.fresh_process import run_python
from tests.helpers.hub_checkpoints import fingerprint, logits_of, model_of, saved
from tests.helpers.tolerances import assert_matches


SHARD_BYTES = 16_000_000
PEAK = """
import sys
from pathlib import Path
from hf_moe_cpt.hub.upcycle import upcycle
from hf_moe_cpt.hub.upcycle import UpcycleOptions

def of_process(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

dense, small, output = sys.argv[1:4]
options = UpcycleOptions(expert_noise=0.1, drop_ratio=0.5)
upcycle(small, output + "-warm", "switch", options)
Path("/proc/self/clear_refs").write_text("5")
before = of_process("VmRSS")
upcycle(dense, output, "switch", options, max_shard_size=int(sys.argv[4]))
print(of_process("VmHWM") - before)
"""
KILLED = """
import os, signal, sys
from hf_moe_cpt.hub import checkpoint_io
from hf_moe_cpt.hub.upcycle import upcycle

whole, calls = checkpoint_io.save_file, []

def save_then_die(*args, **kwargs):
    whole(*args, **kwargs)
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint_io.save_file = save_then_die
upcycle(sys.argv[1], sys.argv[2], "switch", max_shard_size=30_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's record of peak memory")
def test_memory_stays_below_two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model of 3 shards of 16 MB becomes 19 of them, with everything on that computes something.

    The peak is that of the whole process, pages of the files that are read included. The threshold makes the C library
    return freed blocks at once, as it always does above 32 MB, where real shards are.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 9, "vocab_size": 512}
    dense = saved(model_of("llama", **sizes), tmp_path / "dense", max_shard_size=SHARD_BYTES)
    assert len(list(dense.glob("*.safetensors"))) >= 3
    small = saved(model_of("llama"), tmp_path / "small")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    done = run_python("-c", PEAK, str(dense), str(small), str(tmp_path / "moe"), str(SHARD_BYTES))
    shards = list((tmp_path / "moe").glob("*.safetensors"))
    assert len(shards) >= 15
    assert max(path.stat().st_size for path in shards) < 1.05 * SHARD_BYTES
    peak = int(done.stdout.split()[-1])
    assert 0.5 * SHARD_BYTES < peak < 2 * SHARD_BYTES


def test_a_sharded_result_holds_what_one_file_holds(tmp_path: Path) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense", max_shard_size=10_000)
    upcycle(dense, tmp_path / "one", "granular")
    upcycle(dense, tmp_path / "many", "granular", max_shard_size="40KB")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    assert_matches("sharded", logits_of(tmp_path / "many"), logits_of(tmp_path / "one"))


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_claims_to_be_whole_and_can_be_started_again(tmp_path: Path) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense")
    before = fingerprint(dense)
    done = run_python("-c", KILLED, str(dense), str(tmp_path / "moe"), check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "moe").exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name != "dense"]
    assert len(list(left.glob("*.safetensors"))) == 3 and not (left / "config.json").exists()
    made = upcycle(dense, tmp_path / "moe", "switch", UpcycleOptions("zero"))
    assert made.leftovers == (left,)
    assert_matches("again", logits_of(tmp_path / "moe"), logits_of(dense))
    assert fingerprint(dense) == before


@pytest.mark.parametrize("interruption", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_run_removes_what_it_wrote(
    interruption: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense")
    written = []

    def fail_at_the_third(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata=metadata)
        written.append(path)
        if len(written) == 3:
            raise interruption

    monkeypatch.setattr(checkpoint_io, "save_file", fail_at_the_third)
    with pytest.raises(type(interruption)):
        upcycle(dense, tmp_path / "moe", "switch", max_shard_size=30_000)
    assert written[2].name.startswith("model-00003")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense")
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**7, 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs 0.03 GB and its disk has 0.01 GB free: make room"):
        upcycle(dense, tmp_path / "deep" / "moe", "switch")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense")
    before = fingerprint(dense)
    for output in (dense, dense / "config.json"):
        with pytest.raises(ValueError, match="is in use: name a new or an empty folder"):
            upcycle(dense, output, "switch")
    with pytest.raises(ValueError, match="lies inside the checkpoint"):
        upcycle(dense, dense / "moe", "switch")
    assert fingerprint(dense) == before
    (tmp_path / "empty").mkdir()
    upcycle(dense, tmp_path / "empty", "switch")
    assert (tmp_path / "empty" / "config.json").is_file()


def misname(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def rewrite(folder: Path, name: str, value: torch.Tensor | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors.pop(name)
    if value is None:
        index["weight_map"].pop(name)
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NORM, SECOND = "model.norm.weight", "model-00002-of-00003.safetensors"
DAMAGE = {
    "cut short": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 10),
        "model-00002-of-00003.safetensors is cut short or damaged .*: fetch it again",
    ),
    "scrambled": (lambda folder: (folder / SECOND).write_bytes(b"\x99" * 500), f"{SECOND} is cut short or damaged"),
    "shard missing": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing: .* no whole checkpoint"),
    "index broken": (lambda folder: (folder / INDEX).write_text("{"), r"index.json cannot be used \(JSONDecodeError"),
    "index lies": (misname, "lacks model.norm.weight, which model.safetensors.index.json says is in it"),
    "tensor missing": (lambda folder: rewrite(folder, NORM, None), "has no tensor model.norm.weight, which its"),
    "wrong shape": (
        lambda folder: rewrite(folder, NORM, torch.ones(8)),
        r"model.norm.weight has shape \(8,\), but its config.json means \(16,\)",
    ),
    "integers": (
        lambda folder: rewrite(folder, NORM, torch.ones(16, dtype=torch.int8)),
        "model.norm.weight has type I8, allowed are F64, F32, F16, BF16: save the model unquantised",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"is no checkpoint \(no config.json\): name a"),
    "config broken": (lambda folder: (folder / "config.json").write_text("{"), "cannot be used .OSError: .*config"),
    "unknown family": (lambda folder: change_config(folder, model_type="nobody"), "cannot be used .*nobody"),
    "quantised": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised: its weights cannot be rewritten; use the original",
    ),
    "another size": (lambda folder: change_config(folder, vocab_size=50), r"means \(50, 16\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    dense = saved(model_of("llama"), tmp_path / "dense", max_shard_size=12_000)
    assert len(list(dense.glob("*.safetensors"))) == 3
    damage(dense)
    before = fingerprint(dense)
    with pytest.raises(ValueError, match=message) as refusal:
        upcycle(dense, tmp_path / "moe", "switch")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert fingerprint(dense) == before


def test_tensors_are_read_by_name_and_by_row_and_a_plan_that_makes_too_few_is_an_error(tmp_path: Path) -> None:
    model = model_of("llama", torch.bfloat16)
    reader = CheckpointReader(saved(model, tmp_path / "dense", max_shard_size=8_000))
    for name, weight in model.state_dict().items():
        assert reader.require(name, weight.shape) == torch.bfloat16
        assert torch.equal(reader.tensor(name), weight)
        assert torch.equal(reader.row(name, 3), weight[3])
    (piece,) = copied(reader, NORM, (16,), factor=0.5).pieces()
    assert torch.equal(piece, model.model.norm.weight * 0.5)
    planned = PlannedTensor("w", (4, 2), torch.float32, lambda: iter([torch.ones(3, 2)]))
    with pytest.raises(RuntimeError, match="w: 3 of 4 rows were made"):
        checkpoint_io.write_weights(tmp_path, [planned])
