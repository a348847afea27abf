"""The benchmark of routing analysis runs in small, writes its table, and says so when a ratio decides nothing."""

import csv

import pytest

from hf_moe_cpt.routing.trace import RoutingTrace
from hf_moe_cpt.scripts.benchmarks import routing as bench_routing
from hf_moe_cpt.scripts.benchmarks.routing import PARTS, RoutingArguments, main, write_synthetic_trace


@pytest.mark.slow
def test_all_parts_in_small(tmp_path, capsys):
    sizes = "--tokens 3000 --layers 2 --vocabulary 200 --batch_size 2 --length 16 --batches 1 --rounds 2 --device cpu"
    main([*sizes.split(), "--parts", *PARTS, "--output_dir", str(tmp_path)])
    with (tmp_path / "routing.csv").open() as file:
        analysis, collecting, monitor = csv.DictReader(file)
    assert 0 < float(monitor["inside_the_monitor"]) < 1 and float(monitor["ratio"]) > 0
    assert float(analysis["seconds"]) > 0 and 0 < float(analysis["peak_gib"]) < 8
    assert analysis["verdict"] == "within the bar"
    assert float(collecting["lower_quartile"]) <= float(collecting["ratio"]) <= float(collecting["upper_quartile"])
    assert "pb-granular-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bare, collecting, verdict",
    [
        ([1, 1, 1, 1], [1.05, 1.0, 1.02, 1.08], "within the bar"),
        ([1, 1, 1, 1], [1.3, 1.2, 1.15, 1.4], "above the bar"),
        ([1, 1, 1, 1], [0.9, 1.02, 1.3, 1.5], "undecided"),
        ([1, 6, 1, 6], [1.05, 6.2, 1.03, 6.1], "within the bar"),  # a round that is slow as a whole says nothing
    ],
)
def test_the_verdict_is_taken_from_pairs(bare, collecting, verdict, monkeypatch, tmp_path):
    turns = {"bare": iter(bare), "collect": iter(collecting)}
    monkeypatch.setattr(bench_routing, "_seconds", lambda run, device: next(turns[run.__name__]))
    args = RoutingArguments(batch_size=1, length=8, batches=1, rounds=4, device="cpu")
    assert bench_routing.measure_collecting(args, bench_routing.choose_device("cpu"))["verdict"] == verdict


def test_checkpoints_of_synthetic_traces_share_their_text(tmp_path):
    args = RoutingArguments(tokens=1001, layers=1, experts=300, top_k=8, domains=2, vocabulary=50)
    for seed in (0, 1):
        write_synthetic_trace(tmp_path / str(seed), args, seed)
    first, second = (RoutingTrace.open(tmp_path / str(seed)) for seed in (0, 1))
    assert first.num_tokens() == 1001
    assert [shard.tokens_checksum for shard in first.shards] == [shard.tokens_checksum for shard in second.shards]
    index = first.top_k_index(0)
    assert not index.equal(second.top_k_index(0))
    assert (index.sort(-1).values.diff(dim=-1) > 0).all() and 0 <= int(index.min()) <= int(index.max()) < 300
