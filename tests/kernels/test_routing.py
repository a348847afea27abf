"""The table, and rows and tokens in both directions, against their definitions; memory that must not be read."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_moe_cpt.kernels.routing as module
from tests.helpers.expert_layers import DEVICE, FLOAT_DTYPES
from tests.helpers.tolerances import RELATIVE_RMS_LIMIT, assert_matches


# T, K, E, M. A block holds 16384 / E slots (E rounded up to a power of two), at most 1024.
TABLE_SHAPES = {
    "no token": (0, 3, 31, 128),
    "one token": (1, 3, 31, 128),
    "one expert": (37, 1, 1, 16),
    "two experts, 16 slots of repeated ids": (9, 16, 2, 32),
    "three blocks of slots": (417, 6, 5, 64),
    "two blocks of 256 slots, 33 experts": (40, 8, 33, 16),
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


@pytest.mark.parametrize("few", [-1, 10_000], ids=["three launches", "one launch"])
@pytest.mark.parametrize("T, K, E, M", TABLE_SHAPES.values(), ids=TABLE_SHAPES)
def test_table_equals_its_definition(T, K, E, M, few, garbage_in_fresh_integers, monkeypatch):
    """Two blocks of counts are read in a step: the scan takes several steps. Either way for any number of slots."""
    monkeypatch.setattr(module, "_BLOCKS_PER_STEP", 2)
    monkeypatch.setattr(module, "_FEW_SLOTS", few)
    index, weights = routing(T, K, E, weight_dtype=FLOAT_DTYPES[-1])
    want = module.plain_routing_table(index, weights, E, M)
    assert_tables_match(module.routing_table(index, weights, E, M), want, M)
    assert_is_a_table(want, index, weights, E, M)


@pytest.mark.parametrize("build", [module.plain_routing_table, module.routing_table])
def test_tables_written_by_hand(build, garbage_in_fresh_integers):
    """One expert takes all; all slots belong to another rank."""
    weights = torch.ones(1100, 1, device=DEVICE)
    table = build(torch.full((1100, 1), 4, device=DEVICE), weights, 7, 16)
    assert table.group_size.tolist() == [0] * 4 + [1100] + [0] * 2
    assert table.group_start.tolist() == [0] * 5 + [1104] * 3
    assert table.row_of_slot.tolist() == list(range(1100))
    assert table.expert_of_tile[:69].tolist() == [4] * 69
    assert table.weight_of_row[:1104].tolist() == [1.0] * 1100 + [0.0] * 4
    table = build(torch.full((1100, 1), 8, device=DEVICE), weights, 8, 16)
    assert table.group_start.tolist() == [0] * 9 and (table.row_of_slot == -1).all()


def test_ids_outside_the_experts_are_dropped(garbage_in_fresh_integers):
    index, weights = routing(40, 2, 8)
    outside = torch.tensor([-1, 8, 2**32 + 3, -(2**40)], device=DEVICE)
    index[::3, 1] = outside.repeat(4)[:14]
    table = module.routing_table(index, weights, 8, 16)
    assert_tables_match(table, module.plain_routing_table(index, weights, 8, 16), 16)
    assert torch.equal(table.row_of_slot.view(40, 2) == -1, torch.isin(index, outside))


def test_types_and_strides_of_the_arguments_do_not_matter():
    index, weights = routing(11, 3, 7, weight_dtype=torch.float16)
    want = module.plain_routing_table(index, weights, 7, 16)
    assert_tables_match(module.routing_table(index.int(), weights.double(), 7, 16), want, 16)
    assert_tables_match(module.routing_table(index.t().contiguous().t(), weights.repeat(1, 2)[:, :3], 7, 16), want, 16)
    assert_tables_match(module.routing_table(index, weights.requires_grad_(), 7, 16), want, 16)
    assert_tables_match(module.plain_routing_table(index.int(), weights, 7, 16), want, 16)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from([16, 32, 64, 128]))
def test_bound_on_tiles_holds_for_any_group_sizes_and_is_reached(sizes, block_m):
    tiles = sum(-(-size // block_m) for size in sizes)
    assert tiles <= module.num_tiles_bound(sum(sizes), len(sizes), block_m)
    assert module.num_tiles_bound(len(sizes), len(sizes), block_m) == len(sizes)  # one slot each: every tile is needed


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


@pytest.mark.parametrize("build", [module.plain_routing_table, module.routing_table])
@pytest.mark.parametrize("message, change", WRONG.items(), ids=WRONG)
def test_what_a_table_cannot_hold_is_refused(build, message, change):
    arguments = {"top_k_index": torch.zeros(2, 3, dtype=torch.int64), "top_k_weights": torch.zeros(2, 3)}
    arguments |= {"num_experts": 4, "block_m": 16}
    with pytest.raises(ValueError, match=message):
        build(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("T, K, E", [(32768, 3, 31), (32768, 1, 8), (32768, 8, 64), (16384, 8, 128), (4096, 8, 512)])
def test_large_tables_repeat_and_equal_their_definition(T, K, E):
    index, weights = routing(T, K, E, weight_dtype=torch.bfloat16)
    table = module.routing_table(index, weights, E, 128)
    assert_tables_match(table, module.plain_routing_table(index, weights, E, 128), 128)
    used = int(table.group_start[-1])
    for _ in range(5):
        again = module.routing_table(index, weights, E, 128)
        assert torch.equal(again.row_of_slot, table.row_of_slot)
        assert torch.equal(again.weight_of_row[:used], table.weight_of_row[:used])


@pytest.mark.gpu
def test_a_graph_of_the_device_replays_other_routings():
    index, weights = routing(4096, 3, 31)
    module.routing_table(index, weights, 31, 128)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = module.routing_table(index, weights, 31, 128)
    other_index, other_weights = routing(4096, 3, 31, seed=1)
    index.copy_(other_index)
    weights.copy_(other_weights)
    graph.replay()
    assert_tables_match(table, module.plain_routing_table(other_index, other_weights, 31, 128), 128)


# T, K, E, H, M
ROW_SHAPES = {
    "one expert": (20, 1, 1, 16, 16),
    "a row wider than a program and no power of two": (7, 3, 5, 44, 16),
    "16 slots of repeated ids": (3, 16, 2, 8, 32),
    "one column": (1, 2, 3, 1, 16),
}


def case(T, K, E, H, M, dtype=torch.float32, dropped=0, seed=0):
    """Random tokens (T, H), gate weights (T, K) and their table; `dropped` ids on each side of [0, E)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(T, H, generator=generator).to(dtype).to(DEVICE)
    index = torch.randint(-dropped, E + dropped, (T, K), generator=generator).to(DEVICE)
    weights = (torch.rand(T, K, generator=generator) + 0.5).to(DEVICE)
    return tokens, weights, module.plain_routing_table(index, weights, E, M)


def rows_with_poison(table, H, dtype=torch.float32):
    """Random rows (R, H) where a slot lies, NaN everywhere else: in padding and past the last used tile."""
    rows = torch.full((table.weight_of_row.numel(), H), float("nan"), dtype=dtype, device=DEVICE)
    used = table.row_of_slot[table.row_of_slot >= 0].long()
    rows[used] = torch.randn(used.numel(), H, dtype=torch.float32).to(dtype).to(DEVICE)
    return rows


def assert_permuted(tokens, table):
    used = int(table.group_start[-1])
    got, want = module.permute_tokens(tokens, table), module.plain_permute_tokens(tokens, table)
    assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, tokens.dtype, True)
    assert torch.equal(got[:used], want[:used])  # padding rows, which were NaN, among them


def sum_in_float64(rows, table, weights, K):
    """Row by row, with Python's loops."""
    out = torch.zeros(table.row_of_slot.numel() // K, rows.shape[1], dtype=torch.float64)
    for slot, row in enumerate(table.row_of_slot.tolist()):
        if row >= 0:
            weight = 1.0 if weights is None else float(weights.flatten()[slot])
            out[slot // K] += weight * rows[row].double().cpu()
    return out


@pytest.mark.parametrize("T, K, E, H, M", ROW_SHAPES.values(), ids=ROW_SHAPES)
@pytest.mark.parametrize("dtype", [pytest.param(FLOAT_DTYPES[0], marks=pytest.mark.slow), *FLOAT_DTYPES[1:]])
def test_permuted_tokens_and_combined_rows(T, K, E, H, M, dtype, monkeypatch):
    """Against the definition, and a sum in float64; weights are none, or of another type."""
    monkeypatch.setattr(module, "_MAX_BLOCK_H", 16)
    weight_dtype = None if K == 2 else torch.float64 if H == 8 else torch.float32
    tokens, weights, table = case(T, K, E, H, M, dtype, dropped=1)
    assert_permuted(tokens, table)
    weights = None if weight_dtype is None else weights.to(weight_dtype)
    rows = rows_with_poison(table, H, dtype)
    want = sum_in_float64(rows, table, weights, K)
    for combine in (module.combine_rows, module.plain_combine_rows):
        got = combine(rows, table.row_of_slot, weights, K)
        assert got.dtype == dtype
        assert_matches(combine.__name__, got, want)


def test_dropped_slots_add_nothing_even_where_weight_and_memory_are_nan():
    _, weights, table = case(30, 3, 4, 12, 16, dropped=2)
    dropped = table.row_of_slot.view(30, 3) < 0
    assert dropped.all(dim=1).any()
    rows = rows_with_poison(table, 12)
    want = module.combine_rows(rows, table.row_of_slot, weights, 3)
    assert torch.isfinite(want).all()
    assert (want[dropped.all(dim=1)] == 0).all()
    for combine in (module.combine_rows, module.plain_combine_rows):
        got = combine(rows, table.row_of_slot, weights.masked_fill(dropped, float("nan")), 3)
        torch.testing.assert_close(got, want)


def test_the_sum_is_in_float32_and_no_tokens_give_nothing():
    """In float16 each single step of 2^-11 would be lost beside 1."""
    table = module.plain_routing_table(
        torch.zeros(1, 9, dtype=torch.int64, device=DEVICE), torch.ones(1, 9).to(DEVICE), 1, 16
    )
    rows = torch.full((16, 4), 2.0**-11, dtype=torch.float16, device=DEVICE)
    rows[0] = 1.0
    assert module.combine_rows(rows, table.row_of_slot, None, 9).tolist() == [[1 + 2.0**-8] * 4]
    tokens, weights, table = case(0, 3, 5, 24, 16)
    for permute, combine in (
        (module.permute_tokens, module.combine_rows),
        (module.plain_permute_tokens, module.plain_combine_rows),
    ):
        rows = permute(tokens, table)
        assert rows.shape == (0, 24)
        assert combine(rows, table.row_of_slot, weights, 3).shape == (0, 24)
    for gather in (module.gather_partials, module.plain_gather_partials):
        assert gather(torch.empty(2, 0, device=DEVICE), table.row_of_slot, (0, 3), torch.float32).shape == (0, 3)


STRIDED = {
    "every second row, wider": lambda x: x.repeat(1, 2)[:, :24].repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "one row for all": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides_of_the_arguments_do_not_matter(view):
    tokens, weights, table = case(5, 3, 5, 24, 16)
    assert_permuted(view(tokens), table)
    rows = module.plain_permute_tokens(tokens, table)
    got = module.combine_rows(view(rows), table.row_of_slot, weights.t().contiguous().t(), 3)
    torch.testing.assert_close(got, module.plain_combine_rows(view(rows), table.row_of_slot, weights, 3))


@pytest.mark.parametrize(
    "T, K, E, C, dtype", [(1, 1, 1, 1, torch.float64), (50, 3, 7, 6, FLOAT_DTYPES[-1]), (3, 16, 2, 11, torch.float32)]
)
def test_gathered_partials_equal_a_sum_in_float64(T, K, E, C, dtype):
    _, _, table = case(T, K, E, 1, 16, dropped=1)
    partials = torch.stack([rows_with_poison(table, 1).flatten() for _ in range(C)]).t().contiguous().t()  # strided
    want = sum_in_float64(partials.t(), table, None, 1).sum(dim=1).view(T, K)
    for gather in (module.gather_partials, module.plain_gather_partials):
        got = gather(partials, table.row_of_slot, (T, K), dtype)
        assert got.dtype == dtype
        assert_matches(gather.__name__, got, want, max(RELATIVE_RMS_LIMIT[dtype], RELATIVE_RMS_LIMIT[torch.float32]))


def test_what_does_not_fit_together_is_refused():
    tokens, weights, table = case(8, 3, 5, 24, 16)
    rows = module.plain_permute_tokens(tokens, table)
    for permute in (module.permute_tokens, module.plain_permute_tokens):
        with pytest.raises(ValueError, match="24 slots is not of 7 tokens"):
            permute(tokens[:7], table)
        with pytest.raises(ValueError, match="24 slots is not of 0 tokens"):
            permute(tokens[:0], table)
    with pytest.raises(ValueError, match="24 slots are not 4 tokens of 5 slots"):
        module.combine_rows(rows, table.row_of_slot, None, 5)
    with pytest.raises(ValueError, match="weights must be \\(8, 3\\) like the slots, got \\(3, 8\\)"):
        module.combine_rows(rows, table.row_of_slot, weights.view(3, 8), 3)
    with pytest.raises(ValueError, match="24 slots are not 3 tokens of 4 slots"):
        module.gather_partials(rows[:, :2].t(), table.row_of_slot, (3, 4), torch.float32)


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements():
    """13 GB: a product of row and width in int32 would point before the tensor."""
    width, last = 16_384, 2**31 // 16_384 + 1000
    rows = torch.zeros(last + 24, width, dtype=torch.bfloat16, device=DEVICE)
    rows[last] = torch.randn(width, device=DEVICE).bfloat16()
    row_of_slot = torch.tensor([last, 5], dtype=torch.int32, device=DEVICE)
    assert torch.equal(module.combine_rows(rows, row_of_slot, None, 2)[0], rows[last])

    start = torch.tensor([0, last + 24], dtype=torch.int32, device=DEVICE)
    size = torch.tensor([last + 1], dtype=torch.int32, device=DEVICE)  # whose last row is the only one of a token
    weight, tile = torch.empty(last + 24, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    table = module.RoutingTable(row_of_slot[:1], weight, tile, start, size)
    permuted = module.permute_tokens(rows[last:][:1], table)
    assert torch.equal(permuted[last], rows[last])
    assert (permuted[last + 1 :] == 0).all()
    far = rows.as_strided((2, width), (last * width, 1))  # token 1 lies past 2^31 elements
    permuted = module.permute_tokens(
        far, table._replace(row_of_slot=torch.tensor([-1, 7], dtype=torch.int32, device=DEVICE))
    )
    assert torch.equal(permuted[7], rows[last])


@pytest.mark.gpu
@pytest.mark.parametrize("T, K, E, H", [(8192, 3, 31, 1024), (4096, 8, 128, 2048), (2048, 1, 8, 5120)])
def test_large_shapes_repeat_and_equal_their_definitions(T, K, E, H):
    tokens, weights, table = case(T, K, E, H, 128, torch.bfloat16)
    assert_permuted(tokens, table)
    rows = rows_with_poison(table, H, torch.bfloat16)
    got = module.combine_rows(rows, table.row_of_slot, weights, K)
    assert_matches("combined", got, module.plain_combine_rows(rows, table.row_of_slot, weights, K))
    assert torch.equal(got, module.combine_rows(rows, table.row_of_slot, weights, K))
