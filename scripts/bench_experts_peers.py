"""The expert layers that are compared, each behind the same calls: ours, transformers', and other libraries'.

A peer's builder takes a `Case` and gives a layer with the case's weights, or raises `Unavailable` with the reason.
Letters as in bench_experts_case.py. Sources: the public interfaces of transformers 5, liger-kernel 0.8.5,
scattermoe 0.3.0 and sonic-moe 0.1.2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hf_moe_cpt
from hf_moe_cpt.scripts.bench_experts_case import GRADIENTS, Case
from hf_moe_cpt.scripts.benchmark_tools import Unavailable, package_version


OURS = ("hf_moe_cpt", "hf_moe_cpt_low_memory")
CEILING = "dense"


@dataclass(frozen=True)
class Calls:
    """A layer bound to inputs: what is timed, and its results by name for the check (None: nothing to compare)."""

    forward: Callable[[], Any]
    training: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]] | None


class Layer(Protocol):
    """What a builder makes."""

    def calls(self, case: Case) -> Calls:
        """The layer on the inputs of a case, which may have fewer tokens than the one it was built for."""
        ...


def _as_it_is(*values: Any) -> Any:
    return values if len(values) > 1 else values[0]


@dataclass(frozen=True)
class ExpertLayer:
    """A differentiable expert layer.

    forward: (tokens, routing, gates) -> (T, H). leaves: both weights as the library keeps them. routing: from (T, K)
    ids to what the library wants, before the clock starts. layout: from gradients of the leaves to those of (E, 2I, H)
    and (E, H, I).
    """

    forward: Callable[[Tensor, Any, Tensor], Tensor]
    leaves: tuple[Tensor, Tensor]
    routing: Callable[[Tensor], Any] = _as_it_is
    layout: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _as_it_is

    def calls(self, case: Case) -> Calls:
        """Bind to inputs; the forward call is that of training, which keeps what a backward needs."""
        tokens, gates = (tensor.detach().clone().requires_grad_() for tensor in (case.tokens, case.gates))
        routing = self.routing(case.index)

        def forward() -> Tensor:
            return self.forward(tokens, routing, gates)

        def training() -> tuple[Tensor, ...]:
            output = forward()
            return output, *torch.autograd.grad(output, (tokens, *self.leaves, gates), case.output_gradient)

        def results() -> dict[str, Tensor]:
            output, tokens_gradient, *weight_gradients, gates_gradient = training()
            gradients = (tokens_gradient, *self.layout(*weight_gradients), gates_gradient)
            return {"out": output, **dict(zip(GRADIENTS, gradients, strict=True))}

        return Calls(forward, training, results)


@dataclass(frozen=True)
class DenseProducts:
    """The ceiling: every product of a layer as one dense product of all n rows, and nothing else."""

    up: Tensor  # (2I, H)
    down: Tensor  # (H, I)

    def calls(self, case: Case) -> Calls:
        """Two products forward; for training four more, the gradients of both inputs and both weights."""
        n, H, I = case.shape.rows, case.shape.H, case.shape.I  # noqa: E741
        x, h, z, dy = (_random_like(case.tokens, n, width) for width in (H, I, 2 * I, H))

        def forward() -> None:
            x @ self.up.T
            h @ self.down.T

        def training() -> None:
            forward()
            dy @ self.down
            dy.T @ h
            z @ self.up
            z.T @ x

        return Calls(forward, training, None)


def _random_like(tensor: Tensor, *size: int) -> Tensor:
    return torch.randn(size, dtype=tensor.dtype, device=tensor.device)


def build_dense(case: Case) -> DenseProducts:
    """Random weights of one expert."""
    return DenseProducts(case.gate_up[0].clone(), case.down[0].clone())


def through_transformers(name: str) -> Callable[[Case], ExpertLayer]:
    """The builder of a registered experts implementation, run on the experts module of Qwen3-MoE."""

    def build(case: Case) -> ExpertLayer:
        if name != "eager" and name not in ALL_EXPERTS_FUNCTIONS:
            raise Unavailable(f"{name!r} is not registered with transformers' experts interface")
        module = _experts_module(case, name)
        if name in OURS:
            _refuse_fallback(module, case)
        return ExpertLayer(module, (module.gate_up_proj, module.down_proj))

    return build


def _experts_module(case: Case, implementation: str) -> torch.nn.Module:
    config = SimpleNamespace(
        num_experts=case.shape.E,
        hidden_size=case.shape.H,
        moe_intermediate_size=case.shape.I,
        hidden_act=case.activation,
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(case.gate_up)
    module.down_proj = torch.nn.Parameter(case.down)
    return module


def _refuse_fallback(module: torch.nn.Module, case: Case) -> None:
    """Ours runs what it cannot do through grouped_mm, whose time must not stand under our name."""
    implementation = importlib.import_module("hf_moe_cpt.kernels.experts_implementation")
    reason = implementation.why_unsupported(module, case.device, case.dtype)
    if reason is not None:
        raise Unavailable(f"it would fall back to grouped_mm: {reason}")


def build_liger(case: Case) -> ExpertLayer:
    """Liger's fused experts: SwiGLU only, weights as transformers keeps them, int32 ids."""
    _require_gpu(case)
    if case.activation != "silu":
        raise Unavailable(f"Liger's fused experts compute silu, not {case.activation}")
    function = _import("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    leaves = _leaves(case.gate_up, case.down)

    def forward(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
        return function.apply(tokens, *leaves, routing, gates)

    return ExpertLayer(forward, leaves, routing=Tensor.int)


def build_scattermoe(case: Case) -> ExpertLayer:
    """ScatterMoE's two parallel linears around a plain gated activation, as its own GLU MLP has them.

    It wants weights as (E, in, out) views and gates in the dtype of the tokens.
    """
    _require_gpu(case)
    library = _import("scattermoe")
    leaves = _leaves(case.gate_up, case.down)
    activation = ACT2FN[case.activation]

    def forward(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
        order = library.flatten_sort_count(routing, num_experts=case.shape.E)
        up_weight, down_weight = (leaf.transpose(1, 2) for leaf in leaves)
        gate_up = library.parallel_linear(tokens, up_weight, case.shape.K, *order, grouped_out=True)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = activation(gate) * up
        return library.parallel_linear(hidden, down_weight, 1, *order, grouped_in=True, gates=gates.to(tokens.dtype))

    return ExpertLayer(forward, leaves)


def build_sonicmoe(case: Case) -> ExpertLayer:
    """SonicMoE after its router: the fixed-K path of `moe_TC_softmax_topk_layer`, fed with the given routing.

    It wants float32 gates and weights as (2I, H, E) views, the rows of gate and up taking turns.
    """
    functional, activation, leaves = _sonicmoe_parts(case)
    E, K = case.shape.E, case.shape.K

    def forward(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
        count, start, token, scatter, back = (
            torch.empty(length, dtype=torch.int32, device=tokens.device)
            for length in (E, E + 1, routing.numel(), routing.numel(), routing.numel())
        )
        functional.TC_topk_router_metadata_triton(routing, E, count, start, token, scatter, back)
        up_weight, down_weight = (leaf.permute(1, 2, 0) for leaf in leaves)
        places = (token, scatter, back, None, False)
        hidden, kept = functional._UpProjection.apply(
            tokens, up_weight, None, start, routing.numel(), K, *places, activation, False, False
        )
        return functional._DownProjection.apply(
            hidden, kept, down_weight, None, gates.float(), start, len(tokens), K, *places, activation
        )

    return ExpertLayer(forward, leaves, routing=Tensor.int, layout=_gate_then_up)


def build_sonicmoe_general(case: Case) -> ExpertLayer:
    """SonicMoE's public function for any routing, `moe_general_routing_inputs`, which transformers calls too."""
    functional, activation, leaves = _sonicmoe_parts(case)
    stream = torch.cuda.current_stream().cuda_stream

    def routing_of(index: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.arange(len(index), dtype=torch.int32, device=index.device).repeat_interleave(index.shape[1])
        return token, index.flatten().int()

    def forward(tokens: Tensor, routing: tuple[Tensor, Tensor], gates: Tensor) -> Tensor:
        up_weight, down_weight = (leaf.permute(1, 2, 0) for leaf in leaves)
        scores = gates.float().flatten()
        weights = (up_weight, None, down_weight, None)
        return functional.moe_general_routing_inputs(
            tokens, scores, *routing, *weights, case.shape.E, stream, activation, False
        )[0]

    return ExpertLayer(forward, leaves, routing=routing_of, layout=_gate_then_up)


def _sonicmoe_parts(case: Case) -> tuple[ModuleType, Any, tuple[Tensor, Tensor]]:
    _require_gpu(case)
    names = {"silu": "SWIGLU", "gelu": "GEGLU", "gelu_pytorch_tanh": "GEGLU"}
    if case.activation not in names:
        raise Unavailable(f"SonicMoE has no gated {case.activation}")
    functional = _import("sonicmoe.functional")
    activation = getattr(_import("sonicmoe.enums").ActivationType, names[case.activation])
    taking_turns = case.gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return functional, activation, _leaves(taking_turns, case.down)


def _gate_then_up(up_gradient: Tensor, down_gradient: Tensor) -> tuple[Tensor, Tensor]:
    return up_gradient.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2), down_gradient


def _leaves(*weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight.detach().requires_grad_() for weight in weights)


def _require_gpu(case: Case) -> None:
    if case.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} cannot be imported: {error}") from error


@dataclass(frozen=True)
class Peer:
    """Something to compare: how to build it, and the installed package whose version tells which one it is."""

    build: Callable[[Case], Layer]
    package: str

    @property
    def version(self) -> str:
        return hf_moe_cpt.__version__ if self.package == "hf_moe_cpt" else package_version(self.package)


PEERS = {
    CEILING: Peer(build_dense, "torch"),
    "hf_moe_cpt": Peer(through_transformers("hf_moe_cpt"), "hf_moe_cpt"),
    "hf_moe_cpt_low_memory": Peer(through_transformers("hf_moe_cpt_low_memory"), "hf_moe_cpt"),
    "grouped_mm": Peer(through_transformers("grouped_mm"), "transformers"),
    "eager": Peer(through_transformers("eager"), "transformers"),
    "liger": Peer(build_liger, "liger-kernel"),
    "scattermoe": Peer(build_scattermoe, "scattermoe"),
    "sonicmoe": Peer(build_sonicmoe, "sonic-moe"),
    "sonicmoe-general": Peer(build_sonicmoe_general, "sonic-moe"),
}
