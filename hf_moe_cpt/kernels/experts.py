"""The routed experts of a layer as one differentiable operator, made of the kernels of this room.

    forward:   routing table -> permute tokens -> gated up -> down -> combine
    backward:  permute gradient -> gated backward -> both weight gradients, input gradient -> combine

T tokens, K experts per token, H hidden size, I width, E experts, R rows: the T x K (token, expert) pairs, sorted by
expert and padded to whole tiles. Nothing here waits for the device, and no sum depends on the order in which programs
run. Source: ours; docs/kernels.md tells the design. `experts_interface` offers it to transformers' models.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from hf_moe_cpt.kernels.decoding import are_few, experts_of_few
from hf_moe_cpt.kernels.gated import gated_backward, gated_up
from hf_moe_cpt.kernels.gates import Form
from hf_moe_cpt.kernels.grouped_gemm import Tile, TilePlan, bias_gradient, grouped_product, tile_plan, weight_gradient
from hf_moe_cpt.kernels.routing import (
    RoutingTable,
    combine_rows,
    gather_partials,
    num_tiles_bound,
    permute_tokens,
    routing_table,
)


# In low memory the backward pass takes a slice of the tokens at a time.
_MOST_SLICES = 3
_ROWS_WORTH_A_SLICE = 512  # of an expert: half a tile of padding is then an eighth of them


def plain_experts(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    form: Form | str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The definition of `experts`, one (token, expert) pair at a time."""
    form = Form(form) if isinstance(form, str) else form
    output = torch.zeros_like(tokens)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(top_k_index == expert)
        into, back = (matrix[expert] if form.transposed else matrix[expert].T for matrix in (gate_up, down))
        pairs = tokens[token] @ into + (0 if gate_up_bias is None else gate_up_bias[expert])
        expert_output = form.hidden(pairs) @ back + (0 if down_bias is None else down_bias[expert])
        output = output.index_add(0, token, expert_output * top_k_weights[token, slot, None].to(tokens.dtype))
    return output


def experts(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    form: Form | str,
    low_memory: bool = False,
    num_pairs: int | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Sum over a token's K experts of weight x (down(act(gate) * up) + down bias): (T, H), dtype of the tokens.

    tokens (T, H), top_k_index (T, K) integers, top_k_weights (T, K) of any float type, gate_up (E, 2I, H) =
    [gate; up], down (E, H, I), gate_up_bias (E, 2I), down_bias (E, H); `form` says what else their layout can be, and
    the activation, of which the name suffices for this one. Tokens, matrices and biases share one of float32, float16,
    bfloat16. Ids outside [0, E) add nothing, as expert parallelism needs. low_memory: the backward pass computes the
    pre-activations (R, 2I) again instead of keeping them. num_pairs: at least how many ids lie in [0, E), where the
    host knows it; else memory is taken for all T x K.
    """
    form = Form(form) if isinstance(form, str) else form
    inputs = (tokens, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    settings = (form.activation, form.transposed, form.interleaved, [form.alpha, form.limit, form.offset])
    is_seen = _is_seen(tokens)
    if not needs_gradient and are_few(top_k_index.numel(), gate_up.shape[0]):
        return (_few_operator if is_seen else _few)(*inputs, *settings)
    save = not low_memory and needs_gradient
    forward = _experts_forward if is_seen else _Eager.apply if needs_gradient else _forward
    return forward(*inputs, *settings, save, num_pairs)[0]


def _is_seen(tensor: Tensor) -> bool:
    """Whether somebody looks at operators: a compiler, a dispatch mode, a tensor that is more than one. Where nobody
    does there are none, for one costs the host as much as ten launches.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _few(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
    constants: list[float],
) -> Tensor:
    """The output of few tokens."""
    form = Form(activation, transposed, interleaved, *constants)
    return experts_of_few(tokens, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, form)


_few_operator = torch.library.custom_op("hf_moe_cpt::experts_of_few", _few, mutates_args=())
_few_operator.register_fake(lambda tokens, *_: torch.empty_like(tokens, memory_format=torch.contiguous_format))


def _forward(
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    interleaved: bool,
    constants: list[float],
    save: bool,
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output (T, H), the pre-activations (R, 2I) or an empty tensor, and the routing table."""
    form = Form(activation, transposed, interleaved, *constants)
    tokens, gate_up, down = tokens.contiguous(), gate_up.contiguous(), down.contiguous()
    plan = _plan_of(tokens, top_k_index, gate_up, form)
    with torch.cuda.device_of(tokens):  # the current device may be another one; in the backward autograd sets it
        table = routing_table(top_k_index, top_k_weights, gate_up.shape[0], plan.rows_per_tile, num_pairs)
        if tokens.shape[0] == 0:
            return torch.empty_like(tokens), tokens.new_empty(0), *table
        rows = permute_tokens(tokens, table)
        hidden, preactivation = gated_up(rows, gate_up, table, form, save, plan.gated_up, gate_up_bias)
        del rows
        expert_rows = grouped_product(hidden, down, table, not transposed, plan.down, down_bias)
        del hidden
        output = combine_rows(expert_rows, table.row_of_slot, top_k_weights, top_k_index.shape[1])
    return output, preactivation, *table


_experts_forward = torch.library.custom_op("hf_moe_cpt::experts_forward", _forward, mutates_args=())


@_experts_forward.register_fake
def _(
    tokens, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation, transposed, interleaved,
    constants, save, num_pairs=None,
):  # fmt: skip
    num_experts = gate_up.shape[0]
    plan = _plan_of(tokens, top_k_index, gate_up, Form(activation, transposed, interleaved))
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
    preactivation = tokens.new_empty((num_rows, gate_up.shape[2 if transposed else 1]) if save else 0)
    return torch.empty_like(tokens, memory_format=torch.contiguous_format), preactivation, *table


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_SUMS = slice(2, 6)  # of them those that all tokens add to: matrices and biases


def _gradients(
    grad_output: Tensor,
    tokens: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    preactivation: Tensor,
    routing: list[Tensor],
    activation: str,
    transposed: bool,
    interleaved: bool,
    constants: list[float],
    needs: list[bool],
    num_pairs: int | None,
    in_place: bool = False,
    frees: bool = False,
) -> Gradients:
    """Gradients of tokens, top_k_weights, both matrices and both biases; an empty tensor for those not in `needs`.

    routing: the routing table, or without pre-activations the chosen experts alone; then all is computed again, for a
    few slices of the tokens one after the other, so that the rows of one slice alone are held at a time. in_place: the
    pre-activations become scratch memory. frees: and are left without any.
    """
    form = Form(activation, transposed, interleaved, *constants)
    tokens, gate_up, down = tokens.contiguous(), gate_up.contiguous(), down.contiguous()
    inputs = (tokens, top_k_weights, gate_up, down, gate_up_bias, down_bias)
    if tokens.shape[0] == 0:
        return tuple(
            torch.zeros_like(x) if need else tokens.new_empty(0) for x, need in zip(inputs, needs, strict=True)
        )
    grad_output = grad_output.to(tokens.dtype).contiguous()
    if preactivation.numel() > 0:
        found = _slice_gradients(
            grad_output, *inputs, preactivation, RoutingTable(*routing), form, needs, in_place, frees, (None,) * 6
        )
    else:
        (top_k_index,) = routing
        found = [torch.empty_like(x) if need else None for x, need in zip(inputs[:2], needs, strict=False)] + [
            None
        ] * 4
        for first, end in _slices(*top_k_index.shape, gate_up.shape[0]):
            part, index, weights = tokens[first:end], top_k_index[first:end], top_k_weights[first:end]
            plan = _plan_of(part, index, gate_up, form)
            table = routing_table(index, weights, gate_up.shape[0], plan.rows_per_tile, num_pairs)
            rows = permute_tokens(part, table)
            preactivation = grouped_product(rows, gate_up, table, not transposed, plan.down, gate_up_bias)
            del rows
            into = (*(x if x is None else x[first:end] for x in found[:2]), *found[_SUMS])
            found[_SUMS] = _slice_gradients(
                grad_output[first:end], part, weights, *inputs[_SUMS], preactivation, table, form, needs, True, True,
                into,
            )[_SUMS]  # fmt: skip
            del preactivation
    return tuple(tokens.new_empty(0) if gradient is None else gradient for gradient in found)


def _slice_gradients(
    grad_output: Tensor,
    tokens: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    preactivation: Tensor,
    table: RoutingTable,
    form: Form,
    needs: list[bool],
    in_place: bool,
    frees: bool,
    into: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of some tokens, None for those that are not needed.

    frees: memory of pre-activations that are in place is given back once they are read. into: where the gradients of
    tokens and gate weights are written, and the other four to what they are added; None takes new memory.
    """
    plan = _plan_of(tokens, top_k_weights, gate_up, form)
    needs_tokens, needs_weights, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias = needs
    found: list[Tensor | None] = [None] * 6
    grad_rows = permute_tokens(grad_output, table)
    grad_pairs, weighted, partials = gated_backward(
        grad_rows, down, preactivation, table, form, plan.hidden_gradient, in_place
    )
    if down_bias is not None and (needs_weights or needs_down_bias):
        found[5], of_bias = bias_gradient(grad_rows, table, down_bias, into[5])
        partials = torch.cat((partials, of_bias))
    if needs_weights:
        found[1] = gather_partials(partials, table.row_of_slot, top_k_weights.shape, top_k_weights.dtype, into[1])
    if needs_down:
        found[3] = _matrix_gradient(grad_rows, weighted, table, form, plan.down_weight_gradient, into[3])
    del preactivation, grad_rows, weighted, partials
    if needs_gate_up_bias:
        found[4], _ = bias_gradient(grad_pairs, table, total=into[4])
    if needs_gate_up:
        rows = permute_tokens(tokens, table)
        found[2] = _matrix_gradient(grad_pairs, rows, table, form, plan.up_weight_gradient, into[2])
        del rows
    if needs_tokens:  # last, when little else is held
        grad_in_rows = grouped_product(grad_pairs, gate_up, table, form.transposed, plan.input_gradient)
        if frees:
            grad_pairs.untyped_storage().resize_(0)
        found[0] = combine_rows(grad_in_rows, table.row_of_slot, None, top_k_weights.shape[1], into[0])
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


def _matrix_gradient(
    grad_out: Tensor, rows: Tensor, table: RoutingTable, form: Form, tile: Tile, total: Tensor | None
) -> Tensor:
    """Of a matrix that made rows with the gradient `grad_out` of `rows`."""
    sides = (rows, grad_out) if form.transposed else (grad_out, rows)
    return weight_gradient(*sides, table, tile, total)


def _slices(num_tokens: int, num_slots_per_token: int, num_experts: int) -> list[tuple[int, int]]:
    """First and last token of each slice; few slices where experts have few rows, most of which were padding then."""
    rows_per_expert = num_tokens * num_slots_per_token // num_experts
    size = triton.cdiv(num_tokens, max(1, min(_MOST_SLICES, rows_per_expert // _ROWS_WORTH_A_SLICE)))
    return [(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]


def _backward_operator(name: str, in_place: bool) -> Callable[..., Gradients]:
    """`_gradients` as an operator. That which overwrites the pre-activations says so, as torch.compile has to know."""
    schema = (
        "(Tensor grad_output, Tensor tokens, Tensor top_k_weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
        f"Tensor? down_bias, Tensor{'(a!)' if in_place else ''} preactivation, Tensor[] routing, str activation, "
        "bool transposed, bool interleaved, float[] constants, bool[] needs, int? num_pairs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    operator = torch.library.custom_op(
        f"hf_moe_cpt::{name}",
        partial(_gradients, in_place=in_place),
        mutates_args=("preactivation",) if in_place else (),
        schema=schema,
    )

    @operator.register_fake
    def _(grad_output, tokens, top_k_weights, gate_up, down, gate_up_bias, down_bias, *rest):
        inputs, needs = (tokens, top_k_weights, gate_up, down, gate_up_bias, down_bias), rest[-2]
        return tuple(
            x.new_empty(x.shape) if need else tokens.new_empty(0) for x, need in zip(inputs, needs, strict=True)
        )

    return operator


_experts_backward = _backward_operator("experts_backward", in_place=False)
_experts_backward_in_place = _backward_operator("experts_backward_in_place", in_place=True)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    tokens, top_k_index, top_k_weights, *parameters = inputs[:7]
    *ctx.form, _, ctx.num_pairs = inputs[7:]
    _, preactivation, *table = output
    routing = table if preactivation.numel() > 0 else (top_k_index,)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, top_k_weights, *parameters, preactivation, *routing)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor | None, *_: None) -> tuple:
    if grad_output is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # read once: checkpointing refuses a second look
    *inputs, preactivation = saved[:7]
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 3, 4, 5, 6)]
    in_place = _is_last_use(preactivation)
    if _is_seen(grad_output) or torch.is_grad_enabled():  # a second derivative: refused by them
        function = _experts_backward_in_place if in_place else _experts_backward
    else:
        function = partial(_gradients, in_place=in_place, frees=in_place)
    gradients = function(grad_output, *inputs, preactivation, list(saved[7:]), *ctx.form, needs, ctx.num_pairs)
    of_tokens, *others = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return of_tokens, None, *others, *(None,) * 6


def _is_last_use(saved: Tensor) -> bool:
    """Whether nobody reads a saved tensor after this backward pass: its graph is not retained, and it is no stand-in
    of a pass that is being traced.
    """
    return type(saved) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


_experts_forward.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """`_experts_forward` and its derivative without operators."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _plan_of(tokens: Tensor, slots: Tensor, gate_up: Tensor, form: Form) -> TilePlan:
    """slots: any tensor of T x K elements."""
    num_experts, width = gate_up.shape[0], gate_up.shape[2 if form.transposed else 1] // 2
    return tile_plan(slots.numel(), num_experts, width, tokens.dtype, tokens.device, form.interleaved)
