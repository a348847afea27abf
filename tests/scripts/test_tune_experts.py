"""The tuner of tile shapes on the CPU, through Triton's interpreter: every product, a table, and what it refuses."""

import csv

import pytest

from hf_moe_cpt.kernels.tiles import Tile
from hf_moe_cpt.scripts import tune_experts
from hf_moe_cpt.scripts.bench_experts_case import Shape
from hf_moe_cpt.scripts.tune_experts import PIECES, TuneArguments, flops_of, main
from tests.helpers.kernel_device import DEVICE


ALL_WRONG = Tile(128, 48, 32)  # 48 columns are no power of two


@pytest.fixture
def two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that works and one that does not, for every product."""
    monkeypatch.setattr(tune_experts, "CANDIDATES", {piece: [Tile(128, 32, 32), ALL_WRONG] for piece in PIECES})


def test_every_product_is_timed_and_failures_are_told(two_candidates, tmp_path, capsys):
    options = ["--shape", "tiny=130,32,24,3,2", "--rounds", "2", "--seconds", "0", "--dtype", "float32"]
    main([*options, "--device", DEVICE.type, "--output_dir", str(tmp_path)])
    with (tmp_path / "tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["piece"] for row in rows] == ["dense", *(piece for piece in PIECES for _ in range(2))]
    for row in rows[1::2]:
        assert float(row["ms"]) > 0 and row["tile"] == "128x32x32 4 warps 3 stages" and not row["reason"]
    for row in rows[2::2]:
        assert not row["ms"] and row["reason"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"written to {tmp_path / 'tiles.csv'}")


def test_operations_of_all_products_are_those_of_a_training_step():
    """6 n H I forward and twice that backward."""
    shape = Shape("tiny", 10, 32, 24, 3, 2)
    assert sum(flops_of(piece, shape) for piece in PIECES) == shape.training_flops
    assert flops_of("down", shape) == 2 * 20 * 32 * 24


def test_group_sizes_multiply_the_candidates():
    args = TuneArguments(groups=[4, 8])
    tiles = args.candidates("down")
    assert len(tiles) == 2 * len(tune_experts.CANDIDATES["down"]) and {tile.group for tile in tiles} == {4, 8}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shapes": ["nonsense"]}, "--shapes 'nonsense' is unknown: choose from granular, switch"),
        ({"pieces": ["sideways"]}, "--pieces 'sideways' is unknown: choose from gated_up, down"),
        ({"rounds": 0}, "--rounds 0 and --groups"),
        ({"activation": "tanh"}, "--activation 'tanh'"),
        ({"shape": ["x=1,2"]}, "must read name=T,H,I,E,K"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TuneArguments(**options)
