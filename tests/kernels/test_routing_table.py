"""The routing table against its plain definition, against what makes a table one, and at the edges of its shapes."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_moe_cpt.kernels.routing_table as module
from hf_moe_cpt.kernels.routing_table import num_tiles_bound, plain_routing_table, routing_table
from tests.helpers.kernel_device import DEVICE


# T, K, E, M. A block holds 16384 / E slots (E rounded up to a power of two), at most 1024.
SHAPES = {
    "one token": (1, 3, 31, 128),
    "one expert": (37, 1, 1, 16),
    "two experts, 16 slots of repeated ids": (9, 16, 2, 32),
    "switch": (70, 1, 8, 16),
    "granular": (50, 3, 31, 16),
    "three blocks of slots": (417, 6, 5, 64),
    "five blocks of 64 slots, 129 experts": (40, 8, 129, 16),
}


def routing(T, K, E, seed=0, low=0, high=None, index_dtype=torch.int64, weight_dtype=torch.float32):
    """Random ids in [low, high) and weights in [0.5, 1.5), so that no weight is taken for a padding row."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(low, E if high is None else high, (T, K), generator=generator, dtype=index_dtype)
    return index.to(DEVICE), (torch.rand(T, K, generator=generator) + 0.5).to(weight_dtype).to(DEVICE)


def assert_tables_match(got, want, block_m):
    """Equal in all that is specified; what is not must still be readable."""
    used = int(want.group_start[-1])
    for name in ("row_of_slot", "group_start", "group_size"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.weight_of_row[:used], want.weight_of_row[:used])
    assert torch.equal(got.expert_of_tile[: used // block_m], want.expert_of_tile[: used // block_m])
    for name, tensor in got._asdict().items():
        assert tensor.shape == getattr(want, name).shape, name
        assert tensor.dtype == (torch.float32 if name == "weight_of_row" else torch.int32), name
        assert tensor.is_contiguous(), name
    num_experts = got.group_size.numel()
    assert ((got.expert_of_tile >= 0) & (got.expert_of_tile < num_experts)).all()


def assert_is_a_table(table, index, weights, num_experts, block_m):
    """What `RoutingTable` promises, said without the definition."""
    expert, weight = index.flatten().long().tolist(), weights.double().flatten().tolist()
    row_of_slot, start, size = table.row_of_slot.tolist(), table.group_start.tolist(), table.group_size.tolist()
    slot_of_row = {row: slot for slot, row in enumerate(row_of_slot) if row >= 0}
    kept = [slot for slot, e in enumerate(expert) if 0 <= e < num_experts]
    assert sorted(slot_of_row.values()) == kept  # no slot is lost, no row is used twice
    assert sum(size) == len(kept)
    assert start[0] == 0
    assert start[-1] <= table.weight_of_row.numel()
    assert start[-1] <= len(table.expert_of_tile) * block_m
    for e in range(num_experts):
        slots = [slot for slot in kept if expert[slot] == e]
        assert size[e] == len(slots)
        assert start[e + 1] - start[e] == -(-len(slots) // block_m) * block_m
        assert [slot_of_row[start[e] + i] for i in range(size[e])] == slots  # in the order of the slots
        tiles = table.expert_of_tile[start[e] // block_m : start[e + 1] // block_m]
        assert tiles.tolist() == [e] * len(tiles)
    for row, w in enumerate(table.weight_of_row[: start[-1]].tolist()):
        assert w == (weight[slot_of_row[row]] if row in slot_of_row else 0.0)


@pytest.fixture
def garbage_in_fresh_integers(monkeypatch):
    """`torch.empty` of integers gives us a number that is no row, id or size; of floats still NaN."""
    allocate = torch.empty

    def allocate_garbage(*args, **kwargs):
        memory = allocate(*args, **kwargs)
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith("hf_moe_cpt.")
        return memory.fill_(float("nan") if memory.dtype.is_floating_point else -123_456) if ours else memory

    monkeypatch.setattr(torch, "empty", allocate_garbage)


@pytest.mark.parametrize("T, K, E, M", SHAPES.values(), ids=SHAPES)
def test_table_equals_its_definition(T, K, E, M, garbage_in_fresh_integers):
    index, weights = routing(T, K, E)
    assert_tables_match(routing_table(index, weights, E, M), plain_routing_table(index, weights, E, M), M)


@pytest.mark.parametrize("build", [plain_routing_table, routing_table])
@pytest.mark.parametrize("T, K, E, M", [(1, 1, 1, 16), (33, 4, 7, 16), (200, 2, 5, 64), (20, 16, 2, 32)])
def test_table_keeps_its_promises(build, T, K, E, M):
    index, weights = routing(T, K, E, low=-1, high=E + 1)
    assert_is_a_table(build(index, weights, E, M), index, weights, E, M)


def test_more_blocks_than_one_step_of_the_scan_reads(monkeypatch, garbage_in_fresh_integers):
    monkeypatch.setattr(module, "_BLOCKS_PER_STEP", 2)
    index, weights = routing(600, 8, 3)  # five blocks of 1024 slots
    assert_tables_match(routing_table(index, weights, 3, 16), plain_routing_table(index, weights, 3, 16), 16)


@settings(max_examples=12, deadline=None)
@given(
    T=st.integers(0, 60),
    K=st.integers(1, 16),
    E=st.integers(1, 20),
    M=st.sampled_from([16, 32, 64, 128]),
    dropped=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_table_equals_its_definition_for_any_shape(T, K, E, M, dropped, seed):
    index, weights = routing(T, K, E, seed, low=-dropped, high=E + dropped)
    want = plain_routing_table(index, weights, E, M)
    assert_tables_match(routing_table(index, weights, E, M), want, M)
    assert_is_a_table(want, index, weights, E, M)


def test_a_table_written_by_hand():
    index = torch.tensor([[2, 0], [0, 3], [2, 2]], device=DEVICE)
    weights = torch.tensor([[0.5, 1.0], [2.0, 9.0], [3.0, 4.0]], device=DEVICE)
    table = routing_table(index, weights, 3, 16)
    assert table.row_of_slot.tolist() == [16, 0, 1, -1, 17, 18]
    assert table.group_size.tolist() == [2, 0, 3]
    assert table.group_start.tolist() == [0, 16, 16, 32]
    assert table.expert_of_tile.tolist()[:2] == [0, 2]
    assert table.weight_of_row[:32].tolist() == [1.0, 2.0] + [0.0] * 14 + [0.5, 3.0, 4.0] + [0.0] * 13


@pytest.mark.parametrize("build", [plain_routing_table, routing_table])
def test_one_expert_takes_all(build):
    weights = torch.ones(2100, 1, device=DEVICE)
    table = build(torch.full((2100, 1), 4, device=DEVICE), weights, 7, 16)
    assert table.group_size.tolist() == [0] * 4 + [2100] + [0] * 2
    assert table.group_start.tolist() == [0] * 5 + [2112] * 3
    assert table.row_of_slot.tolist() == list(range(2100))
    assert table.expert_of_tile[:132].tolist() == [4] * 132
    assert table.weight_of_row[:2112].tolist() == [1.0] * 2100 + [0.0] * 12


@pytest.mark.parametrize("outside", [-1, 8, 2**32 + 3, -(2**40)])
def test_ids_outside_the_experts_are_dropped(outside, garbage_in_fresh_integers):
    index, weights = routing(40, 2, 8)
    index[::3, 1] = outside
    table = routing_table(index, weights, 8, 16)
    assert_tables_match(table, plain_routing_table(index, weights, 8, 16), 16)
    assert torch.equal(table.row_of_slot.view(40, 2) == -1, index == outside)
    assert int(table.group_size.sum()) == 80 - 14


def test_a_rank_without_any_slot_of_its_own(garbage_in_fresh_integers):
    index, weights = routing(1100, 2, 8, low=8, high=9)
    table = routing_table(index, weights, 8, 16)
    assert_tables_match(table, plain_routing_table(index, weights, 8, 16), 16)
    assert table.group_start.tolist() == [0] * 9


def test_no_tokens(garbage_in_fresh_integers):
    index, weights = routing(0, 3, 31)
    table = routing_table(index, weights, 31, 128)
    assert_tables_match(table, plain_routing_table(index, weights, 31, 128), 128)
    assert [tensor.numel() for tensor in table] == [0, 0, 0, 32, 31]
    assert table.group_start.tolist() == [0] * 32


def test_types_and_strides_of_the_arguments_do_not_matter():
    index, weights = routing(40, 3, 7, weight_dtype=torch.float16)
    want = plain_routing_table(index, weights, 7, 16)
    assert_tables_match(routing_table(index.int(), weights.double(), 7, 16), want, 16)
    assert_tables_match(routing_table(index.t().contiguous().t(), weights.repeat(1, 2)[:, :3], 7, 16), want, 16)
    assert_tables_match(routing_table(index, weights.requires_grad_(), 7, 16), want, 16)
    assert_tables_match(plain_routing_table(index.int(), weights, 7, 16), want, 16)


def test_weights_of_bfloat16_are_widened_exactly():
    index, weights = routing(40, 3, 7, weight_dtype=torch.bfloat16)
    assert_tables_match(routing_table(index, weights, 7, 16), plain_routing_table(index, weights, 7, 16), 16)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from([16, 32, 64, 128]))
def test_bound_on_tiles_holds_for_any_group_sizes_and_is_reached(sizes, block_m):
    tiles = sum(-(-size // block_m) for size in sizes)
    assert tiles <= num_tiles_bound(sum(sizes), len(sizes), block_m)
    assert num_tiles_bound(len(sizes), len(sizes), block_m) == len(sizes)  # one slot each: every tile is needed


WRONG = {
    "flatten batch and time first": {"top_k_index": torch.zeros(2, 3, 1, dtype=torch.int64)},
    "pass expert numbers": {"top_k_index": torch.zeros(2, 3)},
    "pass one gate weight for each choice": {"top_k_weights": torch.zeros(3, 2)},
    "got \\(2, 3\\) torch.int64": {"top_k_weights": torch.zeros(2, 3, dtype=torch.int64)},
    "num_experts=0 is outside": {"num_experts": 0},
    "num_experts=1025 is outside": {"num_experts": 1025},
    "block_m=48 is not one of": {"block_m": 48},
    "split the batch": {
        "top_k_index": torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2),
        "top_k_weights": torch.zeros(1, 1).expand(2**30, 2),
    },
}


@pytest.mark.parametrize("build", [plain_routing_table, routing_table])
@pytest.mark.parametrize("message, change", WRONG.items(), ids=WRONG)
def test_what_a_table_cannot_hold_is_refused(build, message, change):
    arguments = {
        "top_k_index": torch.zeros(2, 3, dtype=torch.int64),
        "top_k_weights": torch.zeros(2, 3),
        "num_experts": 4,
        "block_m": 16,
    }
    with pytest.raises(ValueError, match=message):
        build(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, K, E", [(32_768, 3, 31), (32_768, 1, 8), (32_768, 8, 64), (16_384, 8, 128), (4096, 8, 512)]
)
def test_large_tables_repeat_and_equal_their_definition(T, K, E):
    index, weights = routing(T, K, E, weight_dtype=torch.bfloat16)
    table = routing_table(index, weights, E, 128)
    assert_tables_match(table, plain_routing_table(index, weights, E, 128), 128)
    used = int(table.group_start[-1])
    for _ in range(5):
        again = routing_table(index, weights, E, 128)
        assert torch.equal(again.row_of_slot, table.row_of_slot)
        assert torch.equal(again.weight_of_row[:used], table.weight_of_row[:used])


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device():
    index, weights = routing(4096, 3, 31)
    routing_table(index, weights, 31, 128)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing_table(index, weights, 31, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_of_the_device_replays_other_routings():
    index, weights = routing(4096, 3, 31)
    routing_table(index, weights, 31, 128)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = routing_table(index, weights, 31, 128)
    other_index, other_weights = routing(4096, 3, 31, seed=1)
    index.copy_(other_index)
    weights.copy_(other_weights)
    graph.replay()
    assert_tables_match(table, plain_routing_table(other_index, other_weights, 31, 128), 128)
