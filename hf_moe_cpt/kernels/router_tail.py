"""The tail of a penalty-balanced router in one pass over its logits: softmax, top-k, gates and the penalties' sums.

T tokens, K experts per token, E experts, B programs, z (T, E) logits, p = softmax(z). Sources: Switch Transformers
eq. 4-6 (load balance needs the sums of p and the counts), ST-MoE eq. 5 (the z-loss needs the sum of logsumexp(z)^2).
The kernels are ours: sums go through one row of partial sums per program, added up in a fixed order, without atomics.

With G = d loss / d p, which is the gates' gradient at the chosen experts plus the sums' gradient at all of them,
d loss / d z = p (G - sum_e p G) + 2 logsumexp(z) p * (d loss / d z_square_sum).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_moe_cpt.kernels.logit_blocks import (
    MAX_PROGRAMS,
    check_logits,
    load_counted,
    load_logits,
    runs_in_triton,
    token_blocks,
)


MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_TILE = 4096  # several tiles are alive at once
MAX_BACKWARD_TILE = 2048


class RouterTail(NamedTuple):
    """What follows from a router's logits; floats in at least fp32. Sums leave out the padding, which is routed."""

    gates: torch.Tensor  # (T, K) softmax values of the chosen experts; divided by their sum if normalised
    index: torch.Tensor  # (T, K) int64 expert ids, best first
    probability_sum: torch.Tensor  # (E,) softmax values summed over tokens
    z_square_sum: torch.Tensor  # () logsumexp^2 summed over tokens
    counts: torch.Tensor  # (E,) int64 how many times each expert was chosen


def router_tail(
    logits: torch.Tensor, top_k: int, normalize: bool = False, token_mask: torch.Tensor | None = None
) -> RouterTail:
    """`plain_router_tail` through the operator `hf_moe_cpt::router_tail`: Triton on a GPU, for every device and dtype.

    gates, probability_sum and z_square_sum carry gradient to the logits, once. Raises ValueError if logits are not
    (T, E), the mask is not (T,) bool, or top_k is not in [1, E].
    """
    return RouterTail(*router_tail_operator(logits, top_k, normalize, token_mask))


def plain_router_tail(
    logits: torch.Tensor, top_k: int, normalize: bool = False, token_mask: torch.Tensor | None = None
) -> RouterTail:
    """The definition. logits: (T, E); token_mask: (T,) bool, False for padding; among equal logits the first wins."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = _counted(logits, token_mask)
    probabilities = logits.softmax(dim=-1)
    index = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    gates = probabilities.gather(1, index)
    if normalize:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    return RouterTail(
        gates,
        index,
        torch.where(counted, probabilities, 0.0).sum(dim=0),
        torch.where(counted, logits.logsumexp(dim=-1, keepdim=True).square(), 0.0).sum(),
        counts.scatter_add_(0, index.flatten(), counted.expand_as(index).flatten().to(torch.int64)),
    )


def plain_router_tail_backward(
    logits: torch.Tensor,
    index: torch.Tensor,
    token_mask: torch.Tensor | None,
    normalize: bool,
    grad_gates: torch.Tensor,
    grad_probability_sum: torch.Tensor,
    grad_z_square_sum: torch.Tensor,
) -> torch.Tensor:
    """The gradient (T, E) of the logits, in their dtype, by the formula above."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = _counted(z, token_mask)
    log_sum = z.logsumexp(dim=-1, keepdim=True)
    probabilities = (z - log_sum).exp()
    if normalize:
        chosen = probabilities.gather(1, index)
        total = chosen.sum(dim=-1, keepdim=True)
        grad_gates = (grad_gates - (grad_gates * chosen).sum(dim=-1, keepdim=True) / total) / total
    grad = torch.where(counted, grad_probability_sum, 0.0).scatter_add(1, index, grad_gates)
    grad = grad - (probabilities * grad).sum(dim=-1, keepdim=True)
    grad = grad + torch.where(counted, 2 * log_sum * grad_z_square_sum, 0.0)
    return (probabilities * grad).to(logits.dtype)


def _counted(logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device) if token_mask is None else token_mask
    return mask[:, None]


@torch.library.custom_op(
    "hf_moe_cpt::router_tail",
    mutates_args=(),
    schema="(Tensor logits, int top_k, bool normalize, Tensor? token_mask)"
    " -> (Tensor gates, Tensor index, Tensor probability_sum, Tensor z_square_sum, Tensor counts)",
)
def router_tail_operator(
    logits: torch.Tensor, top_k: int, normalize: bool, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of `RouterTail` in their order; see `router_tail`."""
    check_logits(logits, token_mask)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be between 1 and the {logits.shape[1]} experts, got {top_k}.")
    if runs_in_triton(logits, MAX_EXPERTS) and top_k <= MAX_TOP_K:
        return _triton_router_tail(logits, top_k, normalize, token_mask)
    return tuple(plain_router_tail(logits, top_k, normalize, token_mask))


@router_tail_operator.register_fake
def _(
    logits: torch.Tensor, top_k: int, normalize: bool, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(_empty_tail(logits, top_k))


@torch.library.custom_op("hf_moe_cpt::router_tail_backward", mutates_args=())
def router_tail_backward_operator(
    logits: torch.Tensor,
    index: torch.Tensor,
    token_mask: torch.Tensor | None,
    normalize: bool,
    grad_gates: torch.Tensor,
    grad_probability_sum: torch.Tensor,
    grad_z_square_sum: torch.Tensor,
) -> torch.Tensor:
    """`plain_router_tail_backward` for every device and dtype; Triton on a GPU."""
    arguments = (logits, index, token_mask, normalize, grad_gates, grad_probability_sum, grad_z_square_sum)
    if runs_in_triton(logits, MAX_EXPERTS) and index.shape[1] <= MAX_TOP_K:
        return _triton_router_tail_backward(*arguments)
    return plain_router_tail_backward(*arguments)


@router_tail_backward_operator.register_fake
def _(logits: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    logits, _, ctx.normalize, token_mask = inputs
    ctx.save_for_backward(logits, output[1], token_mask)


def _backward(
    ctx: torch.autograd.function.FunctionCtx,
    grad_gates: torch.Tensor,
    _grad_index: None,
    grad_probability_sum: torch.Tensor,
    grad_z_square_sum: torch.Tensor,
    _grad_counts: None,
) -> tuple[torch.Tensor, None, None, None]:
    logits, index, token_mask = ctx.saved_tensors
    grads = (grad_gates, grad_probability_sum, grad_z_square_sum)
    return router_tail_backward_operator(logits, index, token_mask, ctx.normalize, *grads), None, None, None


router_tail_operator.register_autograd(_backward, setup_context=_save_for_backward)


@triton.jit
def _softmax(logits):
    """p, the largest logit, sum exp(z - largest) and logsumexp of every row of a tile."""
    largest = tl.max(logits, axis=1)
    mass = tl.exp(logits - largest[:, None])
    total = tl.sum(mass, axis=1)
    return mass / total[:, None], largest, total, largest + tl.log(total)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks"])
def _router_tail_kernel(
    logits_ptr, mask_ptr, gates_ptr, index_ptr, sums_ptr, counts_ptr, num_tokens, num_chunks,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (B,): a program owns num_chunks * ROWS tokens.

    It writes their gates and index (T, K), and a row of sums (B, E + 1), sums of p and, last, of logsumexp^2, and of
    counts (B, E). The best expert is found K times among those that remain, a NaN counting as the largest.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, COLUMNS)
    slots = tl.arange(0, SLOTS)
    is_expert = experts < NUM_EXPERTS
    probability_sum = tl.zeros((COLUMNS,), tl.float32)
    z_square = tl.zeros((ROWS,), tl.float32)
    counts = tl.zeros((COLUMNS,), tl.int32)
    for chunk in range(num_chunks):
        tokens = (program * num_chunks + chunk) * ROWS + tl.arange(0, ROWS)
        logits = load_logits(logits_ptr, tokens, experts, num_tokens, NUM_EXPERTS)
        counted = load_counted(mask_ptr, tokens, num_tokens)
        probabilities, largest, total, log_sum = _softmax(logits)
        probability_sum += tl.sum(tl.where(counted[:, None], probabilities, 0.0), axis=0)
        z_square += tl.where(counted, log_sum * log_sum, 0.0)
        rank = tl.where(logits == logits, logits, float("inf"))
        remaining = tl.broadcast_to(is_expert[None, :], (ROWS, COLUMNS))
        gates = tl.zeros((ROWS, SLOTS), tl.float32)
        index = tl.zeros((ROWS, SLOTS), tl.int32)
        for k in tl.static_range(TOP_K):
            best = tl.max(tl.where(remaining, rank, float("-inf")), axis=1)
            is_best = remaining & (rank == best[:, None])
            expert = tl.min(tl.where(is_best, experts[None, :], COLUMNS), axis=1)
            remaining = remaining & (experts[None, :] != expert[:, None])
            gates = tl.where((slots == k)[None, :], (tl.exp(best - largest) / total)[:, None], gates)
            index = tl.where((slots == k)[None, :], expert[:, None], index)
        if NORMALIZE:
            gates = gates / tl.sum(gates, axis=1)[:, None]
        chosen = counted[:, None] & is_expert[None, :] & (remaining == 0)
        counts += tl.sum(chosen.to(tl.int32), axis=0)
        places = tokens.to(tl.int64)[:, None] * TOP_K + slots[None, :]
        keep = (tokens < num_tokens)[:, None] & (slots < TOP_K)[None, :]
        tl.store(gates_ptr + places, gates, mask=keep)
        tl.store(index_ptr + places, index, mask=keep)
    tl.store(sums_ptr + program * (NUM_EXPERTS + 1) + experts, probability_sum, mask=is_expert)
    tl.store(sums_ptr + program * (NUM_EXPERTS + 1) + NUM_EXPERTS, tl.sum(z_square, axis=0))
    tl.store(counts_ptr + program * NUM_EXPERTS + experts, counts, mask=is_expert)


@triton.jit(do_not_specialize=["num_programs"])
def _add_programs_kernel(
    sums_ptr, counts_ptr, probability_sum_ptr, z_square_sum_ptr, total_counts_ptr, num_programs,
    NUM_EXPERTS: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the B rows of sums and counts. Grid (columns of sums / COLUMNS,): a program owns COLUMNS columns."""
    programs = tl.arange(0, PROGRAMS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keep = (programs < num_programs) & (columns < NUM_EXPERTS + 1)[None, :]
    sums = tl.sum(tl.load(sums_ptr + programs * (NUM_EXPERTS + 1) + columns[None, :], mask=keep, other=0.0), axis=0)
    keep = (programs < num_programs) & (columns < NUM_EXPERTS)[None, :]
    counts = tl.sum(tl.load(counts_ptr + programs * NUM_EXPERTS + columns[None, :], mask=keep, other=0), axis=0)
    tl.store(probability_sum_ptr + columns, sums, mask=columns < NUM_EXPERTS)
    tl.store(total_counts_ptr + columns, counts.to(tl.int64), mask=columns < NUM_EXPERTS)
    tl.store(z_square_sum_ptr + (columns - NUM_EXPERTS), sums, mask=columns == NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def _router_tail_backward_kernel(
    logits_ptr, mask_ptr, index_ptr, grad_gates_ptr, grad_probability_sum_ptr, grad_z_square_sum_ptr,
    grad_logits_ptr, num_tokens,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (T / ROWS,): a program writes ROWS rows of grad_logits (T, E)."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, COLUMNS)
    exists = tokens < num_tokens
    logits = load_logits(logits_ptr, tokens, experts, num_tokens, NUM_EXPERTS)
    counted = load_counted(mask_ptr, tokens, num_tokens)
    probabilities, _, _, log_sum = _softmax(logits)
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tokens.to(tl.int64) * TOP_K + k
        expert = tl.load(index_ptr + place, mask=exists, other=0).to(tl.int32)
        grad_gate = tl.load(grad_gates_ptr + place, mask=exists, other=0.0)
        is_kth = experts[None, :] == expert[:, None]
        grad = tl.where(is_kth, grad_gate[:, None], grad)
        chosen = tl.where(is_kth, probabilities, chosen)
    if NORMALIZE:
        total = tl.sum(chosen, axis=1)
        mean = tl.sum(chosen * grad, axis=1) / total
        grad = tl.where(chosen > 0.0, (grad - mean[:, None]) / total[:, None], 0.0)
    grad_sum = tl.load(grad_probability_sum_ptr + experts, mask=experts < NUM_EXPERTS, other=0.0)
    grad += tl.where(counted[:, None], grad_sum[None, :], 0.0)
    grad -= tl.sum(probabilities * grad, axis=1)[:, None]
    grad += tl.where(counted, 2.0 * log_sum * tl.load(grad_z_square_sum_ptr), 0.0)[:, None]
    pointers = grad_logits_ptr + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    tl.store(pointers, probabilities * grad, mask=exists[:, None] & (experts < NUM_EXPERTS)[None, :])


def _empty_tail(logits: torch.Tensor, top_k: int) -> RouterTail:
    num_tokens, num_experts = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return RouterTail(
        logits.new_empty((num_tokens, top_k), dtype=dtype),
        logits.new_empty((num_tokens, top_k), dtype=torch.int64),
        logits.new_empty(num_experts, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(num_experts, dtype=torch.int64),
    )


def _triton_router_tail(
    logits: torch.Tensor, top_k: int, normalize: bool, token_mask: torch.Tensor | None
) -> RouterTail:
    num_tokens, num_experts = logits.shape
    tail = _empty_tail(logits, top_k)
    blocks = token_blocks(max(num_tokens, 1), num_experts, MAX_TILE)
    sums = logits.new_empty((blocks.programs, num_experts + 1), dtype=torch.float32)
    counts = logits.new_empty((blocks.programs, num_experts), dtype=torch.int32)
    mask = None if token_mask is None else token_mask.contiguous()
    with torch.cuda.device_of(logits):
        _router_tail_kernel[(blocks.programs,)](
            logits.contiguous(), mask, tail.gates, tail.index, sums, counts, num_tokens, blocks.chunks,
            TOP_K=top_k, NORMALIZE=normalize, NUM_EXPERTS=num_experts, COLUMNS=blocks.columns, ROWS=blocks.rows,
            SLOTS=triton.next_power_of_2(top_k), num_warps=blocks.num_warps,
        )  # fmt: skip
        columns = 16
        _add_programs_kernel[(triton.cdiv(num_experts + 1, columns),)](
            sums, counts, tail.probability_sum, tail.z_square_sum, tail.counts, blocks.programs,
            NUM_EXPERTS=num_experts, PROGRAMS=MAX_PROGRAMS, COLUMNS=columns,
        )  # fmt: skip
    return tail


def _triton_router_tail_backward(
    logits: torch.Tensor,
    index: torch.Tensor,
    token_mask: torch.Tensor | None,
    normalize: bool,
    grad_gates: torch.Tensor,
    grad_probability_sum: torch.Tensor,
    grad_z_square_sum: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_experts = logits.shape
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    columns = triton.next_power_of_2(num_experts)
    rows = MAX_BACKWARD_TILE // columns
    if num_tokens:
        with torch.cuda.device_of(logits):
            _router_tail_backward_kernel[(triton.cdiv(num_tokens, rows),)](
                logits.contiguous(), None if token_mask is None else token_mask.contiguous(), index.contiguous(),
                grad_gates.contiguous(), grad_probability_sum.contiguous(), grad_z_square_sum, grad_logits, num_tokens,
                TOP_K=index.shape[1], NORMALIZE=normalize, NUM_EXPERTS=num_experts, COLUMNS=columns, ROWS=rows,
                num_warps=4,
            )  # fmt: skip
    return grad_logits
