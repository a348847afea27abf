"""The experts of a few tokens, forward alone: two launches that read each chosen matrix once and sort nothing.

A step of decoding with a small batch is bound by reading matrices, and before that by launches. With less than one
(token, expert) pair for every second expert hardly two pairs share a matrix, so each pair multiplies its own row, on
the ordinary cores: one program owns some columns of the hidden row of a pair, then one owns some columns of the output
of a token and goes over its K experts in their order. Sums are in float32. Source: ours; `experts` has the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.gates import Form, gated, pair_columns, split_pairs


BLOCK_N, BLOCK_K = 16, 256  # columns of a program, and depth of a step


def are_few(num_pairs: int, num_experts: int) -> bool:
    """Whether so few pairs meet so many experts that sorting them costs more than it saves."""
    return 0 < 2 * num_pairs <= num_experts


def experts_of_few(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    form: Form,
) -> Tensor:
    """What `experts` computes, (T, H), of any number of pairs; no gradients."""
    tokens, gate_up, down = tokens.contiguous(), gate_up.contiguous(), down.contiguous()
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    (num_tokens, hidden_size), num_pairs, num_experts = tokens.shape, top_k_index.numel(), gate_up.shape[0]
    width = down.shape[1 if form.transposed else 2]
    hidden = torch.empty(num_pairs, width, dtype=tokens.dtype, device=tokens.device)
    out = torch.empty_like(tokens)
    options = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 4, **form.launch_options()}
    gate = options.pop("GATE")
    with torch.cuda.device_of(tokens):
        _hidden_rows_kernel[(num_pairs, triton.cdiv(width, BLOCK_N))](
            tokens, top_k_index, gate_up, gate_up_bias, hidden, num_experts, width, hidden_size,
            K=top_k_index.shape[1], GATE=gate, **options,
        )  # fmt: skip
        del options["INTERLEAVED"]
        _output_rows_kernel[(num_tokens, triton.cdiv(hidden_size, BLOCK_N))](
            hidden, top_k_index, top_k_weights, down, down_bias, out, num_experts, width, hidden_size,
            K=top_k_index.shape[1], **options,
        )  # fmt: skip
    return out


@triton.jit
def _load_weights(matrix, columns, inside, ks, num_columns, depth, TRANSPOSED: tl.constexpr):
    """(columns, ks) of one expert's matrix, (num_columns, depth) or transposed, in float32."""
    mask = inside[:, None] & (ks < depth)[None, :]
    if TRANSPOSED:
        offset = ks.to(tl.int64)[None, :] * num_columns + columns[:, None]
    else:
        offset = columns.to(tl.int64)[:, None] * depth + ks[None, :]
    return tl.load(matrix + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_experts"])
def _hidden_rows_kernel(
    tokens,  # (T, H)
    top_k_index,  # (T, K)
    gate_up,  # (E, 2I, H), or as the form says
    bias,  # (E, 2I) or None
    hidden,  # (T K, I); rows of other ranks' experts are not written
    num_experts, width, hidden_size, K: tl.constexpr, GATE: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, column blocks). One program computes BLOCK_N columns of the hidden row of one pair."""
    pair = tl.program_id(0)
    expert = tl.load(top_k_index + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    column = tl.program_id(1) * BLOCK_N
    position, inside = pair_columns(column, width, BLOCK_N, INTERLEAVED)
    matrix = gate_up + expert * 2 * width * hidden_size
    row = tokens + (pair // K).to(tl.int64) * hidden_size
    total = tl.zeros((2 * BLOCK_N,), tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        value = tl.load(row + ks, mask=ks < hidden_size, other=0.0).to(tl.float32)
        weights = _load_weights(matrix, position, inside, ks, 2 * width, hidden_size, TRANSPOSED)
        total += tl.sum(weights * value[None, :], axis=1)
    if bias is not None:
        total += tl.load(bias + expert * 2 * width + position, mask=inside, other=0.0).to(tl.float32)
    gate, up = split_pairs(total[None, :], 1, BLOCK_N, INTERLEAVED)
    columns = column + tl.arange(0, BLOCK_N)
    value = gated(gate, up, GATE).reshape(BLOCK_N).to(hidden.dtype.element_ty)
    tl.store(hidden + pair.to(tl.int64) * width + columns, value, mask=columns < width)


@triton.jit(do_not_specialize=["num_experts"])
def _output_rows_kernel(
    hidden,  # (T K, I)
    top_k_index,  # (T, K)
    top_k_weights,  # (T, K)
    down,  # (E, H, I), or transposed
    bias,  # (E, H) or None
    out,  # (T, H)
    num_experts, width, hidden_size, K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, column blocks). One program adds up BLOCK_N columns of the K experts of one token."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < hidden_size
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(K):
        pair = token * K + k
        expert = tl.load(top_k_index + pair).to(tl.int64)
        if (expert >= 0) & (expert < num_experts):
            matrix = down + expert * width * hidden_size
            of_expert = tl.zeros((BLOCK_N,), tl.float32)
            for first in range(0, width, BLOCK_K):
                ks = first + tl.arange(0, BLOCK_K)
                value = tl.load(hidden + pair.to(tl.int64) * width + ks, mask=ks < width, other=0.0).to(tl.float32)
                weights = _load_weights(matrix, columns, inside, ks, hidden_size, width, TRANSPOSED)
                of_expert += tl.sum(weights * value[None, :], axis=1)
            if bias is not None:
                of_expert += tl.load(bias + expert * hidden_size + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(top_k_weights + pair).to(tl.float32) * of_expert
    tl.store(out + token.to(tl.int64) * hidden_size + columns, total.to(out.dtype.element_ty), mask=inside)
