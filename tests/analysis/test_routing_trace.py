"""A trace opens as it was written, or is refused by the name of what is wrong with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hf_moe_cpt.analysis.routing_trace import RoutingTrace, checksum_of_json
from hf_moe_cpt.analysis.trace_writer import TraceWriter
from tests.helpers.routings import random_trace


def test_what_is_written_is_read(tmp_path):
    trace = RoutingTrace.open(random_trace(tmp_path, shape=((5, 2), (300, 3))).folder)
    assert trace.domains == ("prose", "code")
    assert (trace.num_tokens(), trace.num_tokens("prose"), trace.num_tokens("code")) == (75, 50, 25)
    assert [(layer.num_experts, layer.experts_per_token) for layer in trace.layers] == [(5, 2), (300, 3)]
    stored = [load_file(tmp_path / shard.file) for shard in trace.shards]
    assert stored[0]["layer_000.experts"].dtype == np.uint8 and stored[0]["layer_001.experts"].dtype == np.uint16
    for shard, arrays in zip(trace.shards, stored, strict=True):
        assert torch.equal(trace.experts(shard, 1), torch.from_numpy(arrays["layer_001.experts"].astype(np.int16)))
        assert torch.equal(trace.entropy(shard, 0), torch.from_numpy(arrays["layer_000.entropy"]))
        assert torch.equal(trace.probabilities(shard, 1), torch.from_numpy(arrays["layer_001.probabilities"]))
    assert trace.top_k_index(0, "code").shape == (25, 2) and trace.top_k_index(1).shape == (75, 3)
    with pytest.raises(ValueError, match="has no domain 'math': choose from prose, code"):
        trace.top_k_index(0, "math")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard_00000.safetensors",
        "shard_00001.safetensors",
        "shard_00002.safetensors",
        "trace.json",
    ]


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda folder: flip_a_bit(folder / "shard_00001.safetensors", -1), "shard_00001.safetensors is damaged, its"),
        (lambda folder: cut_off(folder / "shard_00002.safetensors"), "shard_00002.safetensors is damaged"),
        (lambda folder: (folder / "shard_00000.safetensors").unlink(), "shard_00000.safetensors cannot be read"),
        (
            lambda folder: (folder / "trace.json").unlink(),
            "no finished trace, trace.json is missing: collect one",
        ),
        (lambda folder: cut_off(folder / "trace.json"), "trace.json is damaged or no index of a trace"),
        (lambda folder: (folder / "trace.json").write_text("[]"), "trace.json is damaged or no index of a trace"),
        (lambda folder: change_index(folder, lambda index: index.update(shards=[])), "its checksum differs"),
        (lambda folder: change_index(folder, lambda index: index.update(format=2), True), "it has format 2"),
        (lambda folder: change_index(folder, forget_a_layer, True), "does not hold what the index says, layer_001"),
    ],
)
def test_damage_is_named(damage, text, tmp_path):
    random_trace(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=text):
        RoutingTrace.open(tmp_path)


def change_index(folder: Path, change, sign: bool = False) -> None:
    path = folder / "trace.json"
    index = json.loads(path.read_text())
    change(index)
    if sign:
        index["checksum"] = checksum_of_json(index)
    path.write_text(json.dumps(index))


def forget_a_layer(index: dict) -> None:
    index["description"]["layers"].pop()


def test_truncation_is_found_without_checksums(tmp_path):
    random_trace(tmp_path)
    cut_off(tmp_path / "shard_00001.safetensors")
    with pytest.raises(ValueError, match="shard_00001.safetensors cannot be read"):
        RoutingTrace.open(tmp_path, verify=False)


def test_no_folder_is_no_trace(tmp_path):
    with pytest.raises(ValueError, match="trace.json is missing: collect one"):
        RoutingTrace.open(tmp_path / "none")


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    trace = random_trace(tmp_path / "whole")
    writer = TraceWriter(tmp_path / "part", trace.description)
    writer.begin()
    arrays = load_file(trace.folder / trace.shards[0].file)
    with pytest.raises(ValueError, match="which its description does not ask for"):
        writer.write(0, "prose", {"token_ids": arrays["token_ids"]})
    writer.write(0, "prose", arrays)
    with pytest.raises(ValueError, match="lacks shard 1 of 2: call collect_routing again"):
        writer.finish(2)
    (tmp_path / "part" / "unfinished.json").write_text("{")
    with pytest.raises(ValueError, match="unfinished.json is damaged"):
        TraceWriter(tmp_path / "part", trace.description).begin()
