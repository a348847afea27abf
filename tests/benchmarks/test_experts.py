"""The benchmark of expert layers on tiny shapes and the tuner of their tiles, which on a CPU runs through Triton's
interpreter: results, failures, counts, and what both refuse."""

import csv
import gc
import io
import math
import weakref
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_moe_cpt.kernels.grouped_gemm import Tile
from hf_moe_cpt.scripts.benchmarks import experts as bench
from hf_moe_cpt.scripts.benchmarks.report import Attempt, Unavailable, graph_of, one_line
from tests.helpers.expert_layers import DEVICE


TINY = bench.Shape("tiny", 24, 16, 8, 5, 2)
CPU = torch.device("cpu")
BASIC = ("--device", "cpu", "--dtype", "float32", "--seconds", "0", "--check_tokens", "16", "--commit", "abc1234")


def tiny_case(dtype: torch.dtype = torch.float32, device: torch.device = CPU, skew: float = 0.2):
    return bench.make_case(TINY, dtype, "silu", skew, device)


def build_absent(case):
    raise Unavailable("nobody has written it")


def build_wrong(case):
    layer = bench.PEERS["eager"].build(case)
    return replace(layer, forward=lambda tokens, routing, gates: layer.forward(tokens, routing, gates.square()))


@dataclass
class Failing:
    """Works until its fourth call, that is, until the first round."""

    dense: bench.DenseProducts

    def calls(self, case, inference):
        calls, count = self.dense.calls(case, inference), iter(range(4))

        def training():
            if next(count, None) is None:
                raise RuntimeError("the device caught\nfire")
            return calls.training()

        return replace(calls, training=training)


MADE_UP = {
    "absent": bench.Peer(build_absent, "no-such-package"),
    "wrong": bench.Peer(build_wrong, "transformers"),
    "failing": bench.Peer(lambda case: Failing(bench.build_dense(case)), "torch"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run with peers that work and peers that do not, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        for name, peer in MADE_UP.items():
            patch.setitem(bench.PEERS, name, peer)
        peers = ["dense", "eager", "grouped_mm", *MADE_UP]
        shape = ["--shape", "tiny=24,16,8,5,2"]
        bench.main([*BASIC, *shape, "--peers", *peers, "--rounds", "2", "--output-dir", str(folder)])
    return folder, printed.getvalue()


@pytest.fixture
def rows(finished) -> dict[str, dict[str, str]]:
    with (finished[0] / "experts.csv").open() as file:
        return {row["peer"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_row_for_each_peer_says_what_was_measured_where(rows):
    assert list(rows) == ["dense", "eager", "grouped_mm", "absent", "wrong", "failing"]
    for row in rows.values():
        assert [row[letter] for letter in "THIEK"] == ["24", "16", "8", "5", "2"]
        assert row["torch"] == torch.__version__ and row["commit"] == "abc1234" and row["dtype"] == "float32"
    assert rows["eager"]["peer_version"] == rows["eager"]["transformers"] and rows["absent"]["peer_version"] == ""


@pytest.mark.slow
def test_times_rates_and_shares_fit_together(rows):
    for name in ("dense", "eager", "grouped_mm", "wrong"):
        row = {key: float(value) for key, value in rows[name].items() if key.startswith(("forward", "training"))}
        for kind, flops in (("forward", 6 * 48 * 16 * 8), ("training", 18 * 48 * 16 * 8)):
            median = row[f"{kind}_ms"]
            assert 0 < row[f"{kind}_ms_min"] <= median <= row[f"{kind}_ms_max"]
            assert row[f"{kind}_tflops"] == pytest.approx(flops / (median * 1e-3) / 1e12, rel=1e-4)
            assert (row[f"{kind}_share_of_dense"] == 1) == (name == "dense")
        assert float(rows[name]["first_call_seconds"]) > 0 and rows[name]["extra_peak_mib"] == ""


@pytest.mark.slow
def test_right_peers_are_exact_and_a_wrong_one_is_found(rows):
    for name in ("eager", "grouped_mm"):
        errors = [float(value) for key, value in rows[name].items() if key.startswith("error_")]
        assert len(errors) == 5 and max(errors) < 2e-6 and rows[name]["status"] == "ok"
    assert rows["wrong"]["status"] == "wrong"
    assert all(float(rows["wrong"][f"error_{name}"]) > 0.1 for name in ("out", "dx", "dw1", "dw2", "dgate"))
    assert rows["dense"]["status"] == "ok" and rows["dense"]["error_out"] == ""


@pytest.mark.slow
def test_failures_are_rows_with_the_reason(rows, finished):
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("failed", "nobody has written it")
    assert rows["failing"]["reason"] == "RuntimeError: the device caught fire" and rows["failing"]["training_ms"] == ""
    assert "tiny absent: nobody has written it\n" in finished[1]


@pytest.mark.slow
def test_table_comes_last(finished):
    folder, printed = finished
    lines = printed.rstrip("\n").split("\n")
    assert [" ".join(line.split()[:2]) for line in lines[-6:]] == [f"tiny {name}" for name in rows_of(folder)]
    assert lines[-3].split()[2:] == "nobody has written it".split()


def rows_of(folder: Path) -> list[str]:
    with (folder / "experts.csv").open() as file:
        return [row["peer"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "shape", [TINY, bench.Shape("one expert each", 7, 12, 20, 4, 1)], ids=lambda shape: shape.name
)
def test_the_dense_products_do_the_flops_that_are_counted(shape):
    calls = bench.build_dense(case := bench.make_case(shape, torch.float32, "silu", 0.0, CPU)).calls(case, False)
    for call, flops in ((calls.forward, shape.forward_flops), (calls.training, shape.training_flops)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == flops
    assert bench.SHAPES["granular"].forward_flops == pytest.approx(425e9, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [TINY, replace(TINY, is_gpt_oss=True)], ids=["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", [*bench.OURS, "grouped_mm"])
def test_layers_are_right_through_the_interface(name, shape, inference):
    case = bench.make_case(shape, torch.float32, "silu", 0.2, DEVICE)
    results, exact = bench.PEERS[name].build(case).calls(case, inference).results(), bench.exact_results(case)
    exact = {key: exact[key] for key in results}
    assert ("dx" in results) is not inference
    assert all(bench.relative_error(results[key], exact[key]) < bench.ERROR_LIMITS[torch.float32] for key in exact)


def test_ours_never_stands_for_the_fallback():
    with pytest.raises(
        Unavailable, match="our experts would fall back to grouped_mm: the compute dtype is torch.float64"
    ):
        bench.PEERS["hf_moe_cpt"].build(tiny_case(torch.float64, device=DEVICE))


@pytest.mark.parametrize("name", ["liger", "scattermoe", "sonicmoe", "sonicmoe_tuned", "sonicmoe_general"])
def test_gpu_libraries_say_what_they_need(name):
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        bench.PEERS[name].build(tiny_case())


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads():
    """Before, only what the call returned was kept: the first replay read memory that was another's or nobody's."""
    reads = torch.ones(1024, device="cuda")
    alive = weakref.ref(reads)
    replay = graph_of(partial(torch.add, reads, 1))
    del reads
    gc.collect()
    replay()
    assert alive() is not None


def test_tokens_choose_different_experts_and_the_load_follows_the_tilt():
    shape = replace(TINY, T=4000, E=8, K=1)
    for skew in (0.0, 1.5):
        case = bench.make_case(shape, torch.float32, "silu", skew, CPU)
        load = case.index.flatten().bincount(minlength=8).sort(descending=True).values / 4000
        weights = torch.arange(1.0, 9.0) ** -skew
        torch.testing.assert_close(load, weights / weights.sum(), atol=0.03, rtol=0)
    assert all(len(set(chosen)) == TINY.K for chosen in tiny_case(skew=2.0).index.tolist())


def test_an_unwritten_result_is_an_error_of_its_own():
    good = torch.ones(20, 3, dtype=torch.float64)
    bad = good.clone()
    bad[17, 2] = float("nan")
    assert math.isnan(bench.relative_error(bad, good)) and bench.relative_error(good + 0.01, good) == pytest.approx(
        0.01
    )
    measurement = bench.Measurement(TINY, "eager", errors={"out": float("nan")})
    assert bench.status_of(measurement, torch.bfloat16) == "wrong"
    with pytest.raises(ValueError, match=r"a result has shape \(3, 20\), \(20, 3\) is right"):
        bench.relative_error(good.T, good)


def test_an_attempt_keeps_errors_and_lets_interruptions_through():
    with Attempt() as attempt:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.25 GiB. GPU 0 has ...")
    assert attempt.reason == "out of memory: tried to allocate 9.25 GiB"
    assert len(one_line(RuntimeError("x" * 1000))) < 320
    with pytest.raises(KeyboardInterrupt), Attempt():
        raise KeyboardInterrupt


def test_own_shapes_take_the_place_of_the_named_ones():
    arguments = bench.ExpertsArguments
    assert [shape.name for shape in arguments().chosen_shapes()] == list(bench.SHAPES)
    assert arguments(shape=["a=1,2,3,4,1"]).chosen_shapes() == [bench.parse_shape("a=1,2,3,4,1")]
    both = arguments(shapes=["switch"], shape=["a=1,2,3,4,1"]).chosen_shapes()
    assert both == [bench.SHAPES["switch"], bench.Shape("a", 1, 2, 3, 4, 1)]


ALL_WRONG = Tile(128, 48, 32)  # 48 columns are no power of two


@pytest.fixture
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that works and one that does not, for every product."""
    monkeypatch.setattr(bench, "CANDIDATES", {piece: [Tile(128, 32, 32), ALL_WRONG] for piece in bench.PIECES})


@pytest.mark.slow
def test_every_product_is_timed_and_failures_are_told(two_candidates, tmp_path, capsys):
    options = ["--shape", "tiny=130,32,24,3,2", "--rounds", "1", "--seconds", "0", "--dtype", "float32"]
    bench.main(["tune", *options, "--device", DEVICE.type, "--output_dir", str(tmp_path)])
    with (tmp_path / "tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["piece"] for row in rows] == ["dense", *(piece for piece in bench.PIECES for _ in range(2))]
    for row in rows[1::2]:
        assert float(row["ms"]) > 0 and row["tile"] == "128x32x32 4 warps 3 stages" and not row["reason"]
    for row in rows[2::2]:
        assert not row["ms"] and row["reason"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"written to {tmp_path / 'tiles.csv'}")


def test_operations_of_all_products_are_those_of_a_training_step():
    """6 n H I forward and twice that backward."""
    shape = bench.Shape("tiny", 10, 32, 24, 3, 2)
    assert sum(bench.flops_of(piece, shape) for piece in bench.PIECES) == shape.training_flops
    assert bench.flops_of("down", shape) == 2 * 20 * 32 * 24


def test_group_sizes_multiply_the_candidates():
    args = bench.TuneArguments(groups=[4, 8])
    tiles = args.candidates("down")
    assert len(tiles) == 2 * len(bench.CANDIDATES["down"]) and {tile.group for tile in tiles} == {4, 8}
