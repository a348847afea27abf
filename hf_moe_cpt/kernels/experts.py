"""The routed experts of a layer as one differentiable operator, made of the kernels of this room.

    forward:   routing table -> permute tokens -> gated up -> down -> combine
    backward:  permute gradient -> gated backward -> both weight gradients, input gradient -> combine

T tokens, K experts per token, H hidden size, I width, E experts, R rows: the T x K (token, expert) pairs, sorted by
expert and padded to whole tiles. Nothing here waits for the device, and no sum depends on the order in which programs
run. Source: ours; docs/kernels.md tells the design. `experts_interface` offers it to transformers' models.
"""

import torch
from torch import Tensor

from hf_moe_cpt.kernels.grouped_gemm import (
    ACTIVATIONS,
    TilePlan,
    gated_backward,
    gated_up,
    grouped_product,
    tile_plan,
    weight_gradient,
)
from hf_moe_cpt.kernels.routing import (
    RoutingTable,
    combine_rows,
    gather_partials,
    num_tiles_bound,
    permute_tokens,
    routing_table,
)


def plain_experts(
    tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """The definition of `experts`, one (token, expert) pair at a time."""
    output = torch.zeros_like(tokens)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(top_k_index == expert)
        gate, up = (tokens[token] @ gate_up[expert].T).chunk(2, dim=-1)
        expert_output = (ACTIVATIONS[activation](gate) * up) @ down[expert].T
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None].to(tokens.dtype))
    return output


def experts(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    low_memory: bool = False,
    num_pairs: int | None = None,
) -> Tensor:
    """Sum over a token's K experts of weight x down(act(gate) * up): (T, H), dtype of the tokens.

    tokens (T, H), top_k_index (T, K) integers, top_k_weights (T, K) of any float type, gate_up (E, 2I, H) =
    [gate; up], down (E, H, I). Tokens and both matrices share one of float32, float16, bfloat16. Ids outside [0, E)
    add nothing, as expert parallelism needs. activation: a key of `ACTIVATIONS`. low_memory: the backward pass
    computes the pre-activations (R, 2I) again instead of keeping them. num_pairs: at least how many ids lie in [0, E),
    where the host knows it; else memory is taken for all T x K.
    """
    tensors = (tokens, top_k_weights, gate_up, down)
    save = not low_memory and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _experts_forward(tokens, top_k_index, top_k_weights, gate_up, down, activation, save, num_pairs)[0]


@torch.library.custom_op("hf_moe_cpt::experts_forward", mutates_args=())
def _experts_forward(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    save: bool,
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output (T, H), the pre-activations (R, 2I) or an empty tensor, and the routing table."""
    tokens, gate_up, down = tokens.contiguous(), gate_up.contiguous(), down.contiguous()
    plan = _plan_of(tokens, top_k_index, gate_up)
    with torch.cuda.device_of(tokens):  # the current device may be another one; in the backward autograd sets it
        table = routing_table(top_k_index, top_k_weights, gate_up.shape[0], plan.rows_per_tile, num_pairs)
        if tokens.shape[0] == 0:
            return torch.empty_like(tokens), tokens.new_empty(0), *table
        rows = permute_tokens(tokens, table)
        hidden, preactivation = gated_up(rows, gate_up, table, activation, save, plan.gated_up)
        del rows
        expert_rows = grouped_product(hidden, down, table, contract_last=True, tile=plan.down)
        del hidden
        output = combine_rows(expert_rows, table.row_of_slot, top_k_weights, top_k_index.shape[1])
    return output, preactivation, *table


@_experts_forward.register_fake
def _(tokens, top_k_index, top_k_weights, gate_up, down, activation, save, num_pairs=None):
    num_experts, double_width, _ = gate_up.shape
    plan = _plan_of(tokens, top_k_index, gate_up)
    num_slots = top_k_index.numel() if num_pairs is None else num_pairs
    num_tiles = num_tiles_bound(num_slots, num_experts, plan.rows_per_tile)
    num_rows = num_tiles * plan.rows_per_tile
    table = RoutingTable(
        row_of_slot=tokens.new_empty(top_k_index.numel(), dtype=torch.int32),
        weight_of_row=tokens.new_empty(num_rows, dtype=torch.float32),
        expert_of_tile=tokens.new_empty(num_tiles, dtype=torch.int32),
        group_start=tokens.new_empty(num_experts + 1, dtype=torch.int32),
        group_size=tokens.new_empty(num_experts, dtype=torch.int32),
    )
    preactivation = tokens.new_empty((num_rows, double_width) if save else 0)
    return torch.empty_like(tokens, memory_format=torch.contiguous_format), preactivation, *table


@torch.library.custom_op("hf_moe_cpt::experts_backward", mutates_args=())
def _experts_backward(
    grad_output: Tensor,
    tokens: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    preactivation: Tensor,
    table: list[Tensor],
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, top_k_weights, gate_up and down; an empty tensor for those not in `needs`."""
    tokens, gate_up, down = tokens.contiguous(), gate_up.contiguous(), down.contiguous()
    inputs = (tokens, top_k_weights, gate_up, down)
    if tokens.shape[0] == 0:
        return tuple(torch.zeros_like(x) if need else x.new_empty(0) for x, need in zip(inputs, needs, strict=True))
    grad_tokens, grad_weights, grad_gate_up, grad_down = (x.new_empty(0) for x in inputs)
    needs_tokens, needs_weights, needs_gate_up, needs_down = needs
    routing = RoutingTable(*table)
    plan = _plan_of(tokens, top_k_weights, gate_up)

    recompute = preactivation.numel() == 0
    if recompute:
        rows = permute_tokens(tokens, routing)
        preactivation = grouped_product(rows, gate_up, routing, contract_last=True, tile=plan.down)
        del rows
    grad_rows = permute_tokens(grad_output.to(tokens.dtype).contiguous(), routing)
    grad_preactivation, weighted, partials = gated_backward(
        grad_rows, down, preactivation, routing, activation, plan.hidden_gradient, in_place=recompute
    )
    if needs_weights:
        grad_weights = gather_partials(partials, routing.row_of_slot, top_k_weights.shape, top_k_weights.dtype)
    if needs_down:
        grad_down = weight_gradient(grad_rows, weighted, routing, plan.down_weight_gradient)
    del preactivation, grad_rows, weighted
    if needs_tokens:
        grad_in_rows = grouped_product(
            grad_preactivation, gate_up, routing, contract_last=False, tile=plan.input_gradient
        )
        grad_tokens = combine_rows(grad_in_rows, routing.row_of_slot, None, top_k_weights.shape[1])
        del grad_in_rows
    if needs_gate_up:
        rows = permute_tokens(tokens, routing)
        grad_gate_up = weight_gradient(grad_preactivation, rows, routing, plan.up_weight_gradient)
    return grad_tokens, grad_weights, grad_gate_up, grad_down


@_experts_backward.register_fake
def _(grad_output, tokens, top_k_weights, gate_up, down, preactivation, table, activation, needs):
    inputs = (tokens, top_k_weights, gate_up, down)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    tokens, _, top_k_weights, gate_up, down, ctx.activation, *_ = inputs
    _, preactivation, *table = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, top_k_weights, gate_up, down, preactivation, *table)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor | None, *_: None) -> tuple:
    if grad_output is None:
        return (None,) * 8
    tokens, top_k_weights, gate_up, down, preactivation, *table = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 3, 4)]
    gradients = _experts_backward(
        grad_output, tokens, top_k_weights, gate_up, down, preactivation, table, ctx.activation, needs
    )
    of_tokens, of_weights, of_gate_up, of_down = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    return of_tokens, None, of_weights, of_gate_up, of_down, None, None, None


_experts_forward.register_autograd(_backward, setup_context=_setup_context)


def _plan_of(tokens: Tensor, slots: Tensor, gate_up: Tensor) -> TilePlan:
    """slots: any tensor of T x K elements."""
    return tile_plan(slots.numel(), gate_up.shape[0], tokens.dtype, tokens.device)
