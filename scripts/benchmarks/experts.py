"""Time the routed experts of one layer, ours beside every library that is installed; find the tiles of our kernels.

python scripts/benchmarks/experts.py --shapes granular switch --rounds 5 --output-dir runs/experts
python scripts/benchmarks/experts.py tune --shapes granular switch olmoe --output-dir runs/tiles

The first times forward and forward with backward. All peers run in one process and take turns, round after round,
beside dense products of the same FLOPs; a peer's builder takes a `Case` and gives a layer with the case's weights, or
raises `Unavailable` with the reason. How and what is measured: docs/benchmarks/README.md. Writes experts.csv and
prints the table last.

The second times every product of a layer with every candidate. Candidates are compiled by many processes at once, then
take turns beside one dense product, because a hot GPU is slower than a cool one. Writes tiles.csv and prints the table
last: what is best for a generation and shape class belongs into hf_moe_cpt/kernels/grouped_gemm.py.

T tokens, H hidden size, I expert width, E experts, K experts per token, n = T K rows (pairs of token and expert). An
expert is W_down (act(W_gate x) * W_up x), W_up of all experts and W_gate kept as one (E, 2I, H) [gate; up], W_down as
(E, H, I). Sources: ours; the shapes are those of the paper's models and of three public ones; the public interfaces of
transformers 5, liger-kernel 0.8.5, scattermoe 0.3.0 and sonic-moe 0.1.2.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.activations import ACT2FN
from transformers.hf_argparser import HfArg
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hf_moe_cpt
from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.kernels.gated import gated_backward, gated_up
from hf_moe_cpt.kernels.gates import Form
from hf_moe_cpt.kernels.grouped_gemm import Tile, grouped_product, weight_gradient
from hf_moe_cpt.kernels.routing import permute_tokens, routing_table
from hf_moe_cpt.machine import check_names, choose_device, machine_facts, package_version, release_memory
from hf_moe_cpt.reports import text_table, write_csv
from hf_moe_cpt.scripts.benchmarks import report as tools
from hf_moe_cpt.scripts.benchmarks.report import Attempt, Unavailable, imported, rows_of, text_of


GRADIENTS = ("dx", "dw1", "dw2", "dgate")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Above this relative error a result counts as wrong; float32 leaves room for tensor cores in tf32.
ERROR_LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}


@dataclass(frozen=True)
class Shape:
    """Sizes of one expert layer, under a name."""

    name: str
    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int
    is_gpt_oss: bool = False  # transposed matrices, interleaved columns, biases and a clamped gate

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the three products n x H x I: gate, up, down."""
        return 6 * self.rows * self.H * self.I

    @property
    def training_flops(self) -> int:
        """Forward and backward: each product has two gradients of its own size."""
        return 3 * self.forward_flops


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("granular", 32_768, 1024, 704, 31, 3),
        Shape("switch", 32_768, 1024, 2816, 8, 1),
        Shape("olmoe", 32_768, 2048, 1024, 64, 8),
        Shape("qwen3-30b", 16_384, 2048, 768, 128, 8),
        Shape("mixtral", 16_384, 4096, 14_336, 8, 2),
        Shape("gpt-oss-20b", 16_384, 2880, 2880, 32, 4, is_gpt_oss=True),
    )
}


def parse_shape(text: str) -> Shape:
    """ "name=T,H,I,E,K" as a shape; raises ValueError with what is wrong with it."""
    name, _, sizes = text.partition("=")
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if not name or len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"--shape {text!r} must read name=T,H,I,E,K with five positive integers.")
    shape = Shape(name, *numbers)
    if shape.K > shape.E:
        raise ValueError(f"--shape {text!r}: a token cannot choose K={shape.K} of E={shape.E} experts.")
    return shape


@dataclass(frozen=True)
class Case:
    """Inputs of one layer, the gradient of its output, and how to compute it."""

    shape: Shape
    activation: str
    tokens: Tensor  # (T, H)
    index: Tensor  # (T, K) int64
    gates: Tensor  # (T, K)
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    output_gradient: Tensor  # (T, H)
    biases: tuple[Tensor, ...] = ()  # gpt-oss: (E, 2I) and (E, H); its matrices are views with both sides swapped

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def first_tokens(self, count: int) -> Case:
        """The same layer on its first `count` tokens, or on all if it has fewer."""
        parts = {name: getattr(self, name)[:count] for name in ("tokens", "index", "gates", "output_gradient")}
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, T=min(count, self.shape.T)), **parts)


def make_case(
    shape: Shape, dtype: torch.dtype, activation: str, skew: float, device: torch.device, seed: int = 0
) -> Case:
    """Random tokens, weights that keep the output near size 1, and a random top-k whose load follows a power law.

    skew: expert number r in a random order is drawn with weight r^-skew; 0 draws all alike.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    weight_of_expert = (torch.randperm(shape.E, generator=generator, device=device) + 1.0) ** -skew
    uniform = torch.rand(shape.T, shape.E, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
    scores = weight_of_expert.log() - (-uniform.log()).log()  # Gumbel noise: top-k draws without replacement
    gates = 0.1 + 0.9 * torch.rand(shape.T, shape.K, generator=generator, device=device)
    biases = (normal(shape.E, 2 * shape.I), normal(shape.E, shape.H)) if shape.is_gpt_oss else ()
    return Case(
        shape=shape,
        activation=activation,
        tokens=normal(shape.T, shape.H),
        index=scores.topk(shape.K, dim=-1).indices,
        gates=gates.to(dtype),
        gate_up=normal(shape.E, 2 * shape.I, shape.H).mul_(shape.H**-0.5),
        down=normal(shape.E, shape.H, shape.I).mul_(shape.I**-0.5),
        output_gradient=normal(shape.T, shape.H),
        biases=biases,
    )


def exact_results(case: Case) -> dict[str, Tensor]:
    """Output and the gradients of tokens, [gate; up], down and gates in float64, one expert at a time."""
    if case.shape.is_gpt_oss:
        module = _experts_module(case, "eager").double()
        tokens, gates = (x.double().requires_grad_() for x in (case.tokens, case.gates))
        output = module(tokens, case.index, gates)
        leaves = (tokens, module.gate_up_proj, module.down_proj, gates)
        gradients = torch.autograd.grad(output, leaves, case.output_gradient.double())
        return {"out": output.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}
    leaves = [getattr(case, name).double().requires_grad_() for name in ("tokens", "gate_up", "down", "gates")]
    tokens, gate_up, down, gates = leaves
    output = torch.zeros_like(tokens)
    for expert, (up_weight, down_weight) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(case.index == expert)
        gate, up = (tokens[token] @ up_weight.T).chunk(2, dim=-1)
        rows = (ACT2FN[case.activation](gate) * up) @ down_weight.T
        output = output.index_add(0, token, rows * gates[token, slot, None])
    gradients = torch.autograd.grad(output, leaves, case.output_gradient.double())
    return {"out": output.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN wherever `got` holds one. Goes over the first dimension in parts."""
    if got.shape != want.shape:
        raise ValueError(f"a result has shape {tuple(got.shape)}, {tuple(want.shape)} is right.")
    pairs = zip(got.detach().split(8), want.split(8), strict=True)
    difference = sum((part.double() - exact).square().sum() for part, exact in pairs)
    return float((difference / want.square().sum()).sqrt())


OURS = ("hf_moe_cpt", "hf_moe_cpt_low_memory")
CEILING = "dense"


@dataclass(frozen=True)
class Calls:
    """A layer bound to inputs: what is timed, and its results by name for the check (None: nothing to compare)."""

    forward: Callable[[], Any]
    training: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]] | None


@dataclass(frozen=True)
class ExpertLayer:
    """A differentiable expert layer.

    forward: (tokens, routing, gates) -> (T, H). leaves: both weights as the library keeps them. routing: from (T, K)
    ids to what the library wants, before the clock starts. layout: after it has stopped.
    """

    forward: Callable[[Tensor, Any, Tensor], Tensor]
    leaves: tuple[Tensor, Tensor]
    routing: Callable[[Tensor], Any] = Tensor.long
    biases: tuple[Tensor, ...] = ()
    layout: Callable[[Tensor], Tensor] = lambda gradient: gradient  # of the first weight, as [gate; up] has it

    def calls(self, case: Case, inference: bool) -> Calls:
        """Bind to inputs, of fewer tokens or as many as it was built for; forward keeps what a backward needs.

        inference: nothing is kept, and there is no backward.
        """
        tokens, gates = (tensor.detach().clone().requires_grad_() for tensor in (case.tokens, case.gates))
        routing = self.routing(case.index)

        def forward() -> Tensor:
            with torch.set_grad_enabled(not inference):
                return self.forward(tokens, routing, gates)

        if inference:
            return Calls(forward, forward, lambda: {"out": forward()})

        def training() -> tuple[Tensor, ...]:
            output = forward()
            leaves = (tokens, *self.leaves, gates, *self.biases)
            return output, *torch.autograd.grad(output, leaves, case.output_gradient)

        def results() -> dict[str, Tensor]:
            found = dict(zip(("out", *GRADIENTS), training(), strict=False))  # those of biases come last
            return found | {"dw1": self.layout(found["dw1"])}

        return Calls(forward, training, results)


@dataclass(frozen=True)
class DenseProducts:
    """The ceiling: every product of a layer as one dense product of all n rows, and nothing else."""

    up: Tensor  # (2I, H)
    down: Tensor  # (H, I)

    def calls(self, case: Case, inference: bool) -> Calls:
        """Two products forward; for training four more, the gradients of both inputs and both weights."""
        n, H, I = case.shape.rows, case.shape.H, case.shape.I  # noqa: E741
        x, h, z, dy = (torch.randn(n, width, dtype=case.dtype, device=case.device) for width in (H, I, 2 * I, H))

        def forward() -> None:
            x @ self.up.T
            h @ self.down.T

        def training() -> None:
            forward()
            dy @ self.down
            dy.T @ h
            z @ self.up
            z.T @ x

        return Calls(forward, forward if inference else training, None)


def build_dense(case: Case) -> DenseProducts:
    """Random weights of one expert."""
    return DenseProducts(case.gate_up[0].clone(), case.down[0].clone())


def through_transformers(name: str) -> Callable[[Case], ExpertLayer]:
    """The builder of a registered experts implementation, run on the experts module of Qwen3-MoE or gpt-oss."""

    def build(case: Case) -> ExpertLayer:
        tools.check_registered(name)
        module = _experts_module(case, name)
        if name in OURS:
            tools.refuse_fallback([module], case.device, case.dtype)
        biases = (module.gate_up_proj_bias, module.down_proj_bias) if case.biases else ()
        return ExpertLayer(module, (module.gate_up_proj, module.down_proj), biases=biases)

    return build


def _experts_module(case: Case, implementation: str) -> torch.nn.Module:
    shape = case.shape
    config = SimpleNamespace(
        num_experts=shape.E,
        num_local_experts=shape.E,
        hidden_size=shape.H,
        intermediate_size=shape.I,
        moe_intermediate_size=shape.I,
        hidden_act=case.activation,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = (GptOssExperts if shape.is_gpt_oss else Qwen3MoeExperts)(config)
    matrices = (case.gate_up, case.down)
    if shape.is_gpt_oss:
        matrices = (matrix.transpose(1, 2).contiguous() for matrix in matrices)
        module.gate_up_proj_bias, module.down_proj_bias = (torch.nn.Parameter(bias) for bias in case.biases)
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(matrix) for matrix in matrices)
    return module


def build_liger(case: Case) -> ExpertLayer:
    """Liger's fused experts: SwiGLU only, weights as transformers keeps them, int32 ids."""
    _require_gpu(case)
    if case.activation != "silu":
        raise Unavailable(f"Liger's fused experts compute silu, not {case.activation}")
    function = imported("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    leaves = _leaves(case.gate_up, case.down)

    def forward(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
        return function.apply(tokens, *leaves, routing, gates)

    return ExpertLayer(forward, leaves, routing=Tensor.int)


def build_scattermoe(case: Case) -> ExpertLayer:
    """ScatterMoE's two parallel linears around a plain gated activation, as its own GLU MLP has them.

    It wants weights as (E, in, out) views and gates in the dtype of the tokens.
    """
    _require_gpu(case)
    library = imported("scattermoe")
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


def through_sonicmoe(is_general: bool, is_tuned: bool) -> Callable[[Case], ExpertLayer]:
    """The builder of SonicMoE after its router: rows of gate and up taking turns, weights (2I, H, E), float32 gates.

    Either its path of K experts for each token, or `moe_general_routing_inputs`, for any number. is_tuned: with the
    tuner of its products; else each takes the library's default.
    """

    def build(case: Case) -> ExpertLayer:
        _require_gpu(case)
        if case.activation != "silu":
            raise Unavailable(f"silu alone is run, not {case.activation}")
        functional, products = imported("sonicmoe.functional"), imported("quack.gemm_interface")
        activation = imported("sonicmoe.enums").ActivationType.SWIGLU
        leaves = _leaves(case.gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), case.down)
        E, K, stream = case.shape.E, case.shape.K, torch.cuda.current_stream().cuda_stream  # noqa: N806

        parts = [imported(f"sonicmoe.functional.{part}") for part in ("forward", "backward")]
        names = itertools.product(parts, ("gemm", "gemm_gated", "gemm_dgated"))
        chosen = [(part, name, partial(getattr(products, name), tuned=is_tuned)) for part, name in names]

        def choose_tuner() -> None:
            for choice in chosen:
                setattr(*choice)

        def general(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
            choose_tuner()
            token = torch.arange(len(routing), dtype=torch.int32, device=tokens.device).repeat_interleave(K)
            weights = (leaves[0].permute(1, 2, 0), None, leaves[1].permute(1, 2, 0), None)
            scores = gates.float().flatten()
            return functional.moe_general_routing_inputs(
                tokens, scores, token, routing.flatten(), *weights, E, stream, activation, False
            )[0]

        def fixed(tokens: Tensor, routing: Tensor, gates: Tensor) -> Tensor:
            choose_tuner()
            up, down = (leaf.permute(1, 2, 0) for leaf in leaves)
            n = routing.numel()
            count, start, token, scatter, back = (
                torch.empty(size, dtype=torch.int32, device=tokens.device) for size in (E, E + 1, n, n, n)
            )
            functional.TC_topk_router_metadata_triton(routing, E, count, start, token, scatter, back)
            places = (token, scatter, back, None, False, activation)
            hidden, kept = functional._UpProjection.apply(tokens, up, None, start, n, K, *places, False, False)
            return functional._DownProjection.apply(
                hidden, kept, down, None, gates.float(), start, len(tokens), K, *places
            )

        return ExpertLayer(
            general if is_general else fixed, leaves, routing=Tensor.int,
            layout=lambda gradient: gradient.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2),
        )  # fmt: skip

    return build


def _leaves(*weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(weight.detach().requires_grad_() for weight in weights)


def _require_gpu(case: Case) -> None:
    """And experts that other libraries' layers know."""
    if case.shape.is_gpt_oss:
        raise Unavailable("it has no experts of gpt-oss")
    if case.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")


@dataclass(frozen=True)
class Peer:
    """Something to compare: how to build it, and the installed package whose version tells which one it is."""

    build: Callable[[Case], ExpertLayer | DenseProducts]
    package: str

    @property
    def version(self) -> str:
        return hf_moe_cpt.__version__ if self.package == "hf_moe_cpt" else package_version(self.package)


PEERS = {
    CEILING: Peer(build_dense, "torch"),
    "hf_moe_cpt": Peer(through_transformers("hf_moe_cpt"), "hf_moe_cpt"),
    "hf_moe_cpt_low_memory": Peer(through_transformers("hf_moe_cpt_low_memory"), "hf_moe_cpt"),
    "grouped_mm": Peer(through_transformers("grouped_mm"), "transformers"),
    "batched_mm": Peer(through_transformers("batched_mm"), "transformers"),
    "eager": Peer(through_transformers("eager"), "transformers"),
    "liger": Peer(build_liger, "liger-kernel"),
    "scattermoe": Peer(build_scattermoe, "scattermoe"),
    "sonicmoe": Peer(through_sonicmoe(is_general=False, is_tuned=False), "sonic-moe"),
    "sonicmoe_tuned": Peer(through_sonicmoe(is_general=False, is_tuned=True), "sonic-moe"),
    "sonicmoe_general": Peer(through_sonicmoe(is_general=True, is_tuned=False), "sonic-moe"),
}


@dataclass
class LayerArguments(tools.BenchmarkArguments):
    """Which layers, on what, and how often."""

    shapes: list[str] | None = HfArg(default=None, help=f"Named shapes: {', '.join(SHAPES)}.")
    shape: list[str] | None = HfArg(
        default=None, help="Shapes of your own as name=T,H,I,E,K: tokens, hidden, width, experts, top-k."
    )
    dtype: str = HfArg(default="bfloat16", help=f"Of weights and tokens: {', '.join(DTYPES)}.")
    activation: str = HfArg(default="silu", help="Of the gate.")
    rounds: int = HfArg(default=5, help="How often each has its turn.")
    seed: int = HfArg(default=0, help="Of the random inputs.")

    usual: ClassVar[tuple[str, ...]] = tuple(SHAPES)  # without shapes of either kind

    def __post_init__(self) -> None:
        check_names("--shapes", self.shapes, SHAPES)
        check_names("--dtype", [self.dtype], DTYPES)
        self.check_least({"rounds": 1})
        self.chosen_shapes()

    def chosen_shapes(self) -> list[Shape]:
        """The named shapes, then the user's own; the usual ones without either."""
        parsed = [parse_shape(text) for text in self.shape or ()]
        names = self.shapes if self.shapes is not None or parsed else self.usual
        return [SHAPES[name] for name in names or ()] + parsed


@dataclass
class ExpertsArguments(LayerArguments):
    """What is measured, and for how long."""

    peers: list[str] | None = HfArg(default=None, help=f"What is compared: {', '.join(PEERS)}; all if not given.")
    skew: float = HfArg(default=0.2, help="Power of the load's tilt: expert number r is drawn with weight r^-skew.")
    seconds: float = HfArg(default=0.2, help="Time for one measurement of a turn; there are two.")
    inference: bool = HfArg(default=False, help="The forward pass alone, without a graph: a step of decoding.")
    graphs: bool = HfArg(default=False, help="Time CUDA graphs: the device alone.")
    check: bool = HfArg(default=True, help="Compare results and gradients with float64 first.")
    check_tokens: int = HfArg(default=2048, help="Tokens of that comparison.")
    output_dir: str = HfArg(default="runs/experts", help="Folder for experts.csv.")

    def __post_init__(self) -> None:
        check_names("--peers", self.peers, PEERS)
        check_names("--activation", [self.activation], ACT2FN)
        self.check_least({"check_tokens": 1, "seconds": 0, "skew": 0})
        super().__post_init__()


@dataclass
class Measurement:
    """What is known of one peer at one shape; `reason` says why the rest is missing."""

    shape: Shape
    peer: str
    reason: str | None = None
    first_call_seconds: float | None = None
    extra_peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # relative, of the output and each gradient
    forward_ms: list[float] = field(default_factory=list)  # one a round
    training_ms: list[float] = field(default_factory=list)


def measure_shape(shape: Shape, args: ExpertsArguments, stopwatch: tools.Stopwatch, bar: tqdm) -> list[Measurement]:
    """Prepare and check every peer, then let them take turns."""
    device = stopwatch.device
    names = args.peers or list(PEERS)
    measurements = {name: Measurement(shape, name) for name in names}
    with Attempt() as inputs:
        case = make_case(shape, DTYPES[args.dtype], args.activation, args.skew, device, args.seed)
        exact = exact_results(case.first_tokens(args.check_tokens)) if args.check else None
    if inputs.reason is not None:
        bar.update(len(names) * (1 + args.rounds))
        return [dataclasses.replace(m, reason=f"inputs or reference: {inputs.reason}") for m in measurements.values()]
    calls: dict[str, Calls] = {}
    for name, measurement in measurements.items():
        bar.set_description(f"{shape.name} {name}")
        with Attempt() as attempt:
            calls[name] = prepare(measurement, case, exact, args, stopwatch)
        measurement.reason = attempt.reason
        bar.write(_prepared(measurement))  # what a run that is killed leaves of an unfinished shape
        bar.update()
        if args.graphs and measurement.reason is None:
            with Attempt() as attempt:
                both = (tools.graph_of(call) for call in (calls[name].forward, calls[name].training))
                calls[name] = Calls(*both, results=None)
            measurement.reason = attempt.reason
    exact = None
    with Attempt():  # after an error that lasts the device refuses this too; the turns will say so
        release_memory(device)
    for _ in range(args.rounds):
        for name, measurement in measurements.items():
            bar.set_description(f"{shape.name} {name}")
            if measurement.reason is None:
                with Attempt() as attempt:
                    measurement.forward_ms.append(stopwatch.milliseconds(calls[name].forward, args.seconds))
                    if not args.inference:
                        measurement.training_ms.append(stopwatch.milliseconds(calls[name].training, args.seconds))
                measurement.reason = attempt.reason
            bar.update()
    return list(measurements.values())


def _prepared(measurement: Measurement) -> str:
    """One line on a peer that is ready, or why it is not."""
    if measurement.reason is not None:
        return f"{measurement.shape.name} {measurement.peer}: {measurement.reason}"
    facts = {"first call s": measurement.first_call_seconds, "extra MiB": measurement.extra_peak_mib}
    facts |= {f"error {name}": error for name, error in measurement.errors.items()}
    told = ", ".join(f"{name} {value:.2g}" for name, value in facts.items() if value is not None)
    return f"{measurement.shape.name} {measurement.peer}: {told}"


def prepare(
    measurement: Measurement,
    case: Case,
    exact: dict[str, torch.Tensor] | None,
    args: ExpertsArguments,
    stopwatch: tools.Stopwatch,
) -> Calls:
    """Build a peer, time its first call, read its memory at the second, compare it with the exact results."""
    layer = PEERS[measurement.peer].build(case)
    calls = layer.calls(case, args.inference)
    measurement.first_call_seconds = stopwatch.wall_seconds(calls.training)
    if calls.results is not None:
        measurement.extra_peak_mib = tools.extra_peak_mebibytes(calls.training, stopwatch.device)
        if exact is not None:
            if stopwatch.on_gpu:  # what a peer then allocates and forgets to write shows up in its results
                torch.full((tools.GIBIBYTE // 4,), float("nan"), device=stopwatch.device)
            results = layer.calls(case.first_tokens(args.check_tokens), args.inference).results()
            measurement.errors = {name: relative_error(result, exact[name]) for name, result in results.items()}
    return calls


def status_of(measurement: Measurement, dtype: torch.dtype) -> str:
    """ "ok", "wrong" where an error is above the limit of the dtype, "failed" where there is a reason."""
    if measurement.reason is not None:
        return "failed"
    limit = ERROR_LIMITS[dtype]
    return "ok" if all(error <= limit for error in measurement.errors.values()) else "wrong"  # NaN is wrong


def result_row(
    measurement: Measurement, ceiling: Measurement | None, args: ExpertsArguments, facts: dict[str, str]
) -> dict[str, Any]:
    """One line of experts.csv. ceiling: the dense products at the same shape."""
    shape = measurement.shape
    row: dict[str, Any] = {"shape": shape.name, **{letter: getattr(shape, letter) for letter in "THIEK"}}
    row |= {
        "peer": measurement.peer,
        "status": status_of(measurement, DTYPES[args.dtype]),
        "reason": measurement.reason,
    }
    kinds = {
        "forward": (measurement.forward_ms, shape.forward_flops, ceiling and ceiling.forward_ms),
        "training": (measurement.training_ms, shape.training_flops, ceiling and ceiling.training_ms),
    }
    for kind, (times, flops, ceiling_times) in kinds.items():
        median = tools.middle(times)
        row |= {f"{kind}_ms": median, f"{kind}_ms_min": min(times, default=None)}
        row |= {f"{kind}_ms_max": max(times, default=None), f"{kind}_tflops": median and flops / median / 1e9}
        # Numbers of the same round only: the clock of a GPU drifts between rounds.
        row[f"{kind}_share_of_dense"] = tools.middle([d / t for d, t in zip(ceiling_times or (), times, strict=False)])
    row |= {"extra_peak_mib": measurement.extra_peak_mib, "first_call_seconds": measurement.first_call_seconds}
    row |= {f"error_{name}": measurement.errors.get(name) for name in ("out", *GRADIENTS)}
    row |= {
        name: getattr(args, name) for name in ("dtype", "activation", "skew", "rounds", "seconds", "seed", "graphs")
    }
    return row | {"peer_version": PEERS[measurement.peer].version, **facts}


def peers_main(argv: Sequence[str]) -> None:
    """Measure shape by shape; the results so far are on disk after each."""
    (args,) = parse_arguments((ExpertsArguments,), argv, program="experts.py", description=__doc__)
    device = choose_device(args.device)
    facts, folder, shapes = machine_facts(device, args.commit), Path(args.output_dir), args.chosen_shapes()
    folder.mkdir(parents=True, exist_ok=True)
    stopwatch = tools.Stopwatch(device)
    rows: list[dict[str, Any]] = []
    total = len(shapes) * len(args.peers or PEERS) * (1 + args.rounds)
    with tqdm(total=total, unit="turn", dynamic_ncols=True) as bar:
        for shape in shapes:
            found = measure_shape(shape, args, stopwatch, bar)
            ceiling = next((m for m in found if m.peer == CEILING), None)
            rows += [result_row(measurement, ceiling, args, facts) for measurement in found]
            write_csv(folder / "experts.csv", rows)
            with Attempt():
                release_memory(device)
        bar.set_description("done")
    for row in rows:
        if row["status"] == "failed":
            print(f"{row['shape']} {row['peer']}: {row['reason']}")
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {args.dtype}; files in {folder}\n")
    print(text_of(folder / "experts.csv"))


# As transformers names what the kernels call by shorter names.
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
PIECES = ("gated_up", "down", "hidden_gradient", "input_gradient", "up_weight_gradient", "down_weight_gradient")


def read_candidates(path: Path) -> dict[str, list[Tile]]:
    """The tiles that are tried for each product, from a line for each tile."""
    found: dict[str, list[Tile]] = {piece: [] for piece in PIECES}
    for row in rows_of(path):
        pieces = row.pop("pieces").split()
        numbers = {name: int(value) for name, value in row.items() if value}
        flags = {name: bool(numbers[name]) for name in ("persistent", "tma")}
        for piece in pieces:
            found[piece].append(Tile(**numbers | flags))
    return found


CANDIDATES = read_candidates(Path(__file__).with_name("tiles.csv"))


@dataclass
class TuneArguments(LayerArguments):
    """What is tuned, and for how long."""

    pieces: list[str] | None = HfArg(default=None, help=f"Products, all by default: {', '.join(PIECES)}.")
    groups: list[int] = HfArg(
        default_factory=lambda: [8], help="Row tiles walked together; each is tried with each candidate."
    )
    seconds: float = HfArg(default=0.02, help="Time for one turn.")
    workers: int = HfArg(default=0, help="Processes that compile; 0 takes one for each core.")
    output_dir: str = HfArg(default="runs/tiles", help="Folder for tiles.csv.")

    usual: ClassVar[tuple[str, ...]] = ("granular", "switch", "olmoe")

    def __post_init__(self) -> None:
        check_names("--pieces", self.pieces, PIECES)
        check_names("--activation", [self.activation], ACTIVATION_NAMES)
        if any(group < 1 for group in self.groups):
            raise ValueError(f"--groups {self.groups} must be at least 1.")
        super().__post_init__()

    def candidates(self, piece: str) -> list[Tile]:
        """Every tile of the piece with every group size."""
        tiles = itertools.product(CANDIDATES[piece], self.groups)
        return [dataclasses.replace(tile, group=group) for tile, group in tiles]


def pieces_of(shape: Shape, args: TuneArguments, device: torch.device) -> dict[str, Callable[[Tile], Any]]:
    """The products of one layer, each as a call of its tile; their inputs lie ready, routed at random."""
    case = make_case(shape, DTYPES[args.dtype], ACTIVATION_NAMES[args.activation], 0.2, device, args.seed)
    table = routing_table(case.index, case.gates, shape.E, block_m=128)
    rows = permute_tokens(case.tokens, table)
    tile, form = Tile(128, 64, 32, num_warps=8), Form(args.activation)
    hidden, preactivation = gated_up(rows, case.gate_up, table, form, save=True, tile=tile)
    return {
        "gated_up": lambda tile: gated_up(rows, case.gate_up, table, form, save=True, tile=tile),
        "down": lambda tile: grouped_product(hidden, case.down, table, contract_last=True, tile=tile),
        "hidden_gradient": lambda tile: gated_backward(rows, case.down, preactivation, table, form, tile),
        "input_gradient": lambda tile: grouped_product(
            preactivation, case.gate_up, table, contract_last=False, tile=tile
        ),
        "up_weight_gradient": lambda tile: weight_gradient(preactivation, rows, table, tile),
        "down_weight_gradient": lambda tile: weight_gradient(rows, hidden, table, tile),
    }


def flops_of(piece: str, shape: Shape) -> int:
    """Of one product: 2 x (token, expert) pairs x hidden size x width, twice that for the two halves."""
    single = 2 * shape.rows * shape.H * shape.I
    return single * (2 if piece in ("gated_up", "input_gradient", "up_weight_gradient") else 1)


def compile_candidates(args: TuneArguments, device: torch.device) -> None:
    """Fill Triton's cache on disk: each process compiles every n-th candidate, for all shapes."""
    jobs = [(piece, tile) for piece in args.pieces or PIECES for tile in args.candidates(piece)]
    workers = min(args.workers or os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        shares = [jobs[number::workers] for number in range(workers)]
        list(pool.map(_compile_share, shares, [args] * workers, [device] * workers))


def _compile_share(jobs: Sequence[tuple[str, Tile]], args: TuneArguments, device: torch.device) -> None:
    for shape in args.chosen_shapes():
        small = dataclasses.replace(shape, T=256)
        pieces = pieces_of(small, args, device)
        for piece, tile in jobs:
            with Attempt():  # the same error comes again, and is reported, when the candidate is timed
                pieces[piece](tile)


def tune_shape(shape: Shape, args: TuneArguments, device: torch.device, progress: tqdm) -> list[dict[str, Any]]:
    """A row for each candidate of each piece, fastest first within a piece."""
    pieces = pieces_of(shape, args, device)
    watch = tools.Stopwatch(device)
    times: dict[tuple[str, Tile], list[float]] = {}
    reasons: dict[tuple[str, Tile], str] = {}
    dense = _dense_product(shape, DTYPES[args.dtype], device)
    for _ in range(args.rounds):
        times.setdefault(("dense", None), []).append(watch.milliseconds(dense, args.seconds))
        for piece in args.pieces or PIECES:
            for tile in args.candidates(piece):
                progress.update()
                if (piece, tile) in reasons:
                    continue
                with Attempt() as attempt:
                    elapsed = watch.milliseconds(lambda run=pieces[piece], tile=tile: run(tile), args.seconds)
                    times.setdefault((piece, tile), []).append(elapsed)
                if attempt.reason is not None:
                    reasons[piece, tile] = attempt.reason
    rows = [_row(shape, piece, tile, values) for (piece, tile), values in times.items()]
    rows += [_row(shape, piece, tile, [], reason) for (piece, tile), reason in reasons.items()]
    order = ["dense", *PIECES]
    return sorted(rows, key=lambda row: (order.index(row["piece"]), row["ms"] or float("inf")))


def _dense_product(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """One dense product with the FLOPs of the up projection: what the machine gives at this temperature."""
    left = torch.randn(shape.rows, shape.H, dtype=dtype, device=device)
    right = torch.randn(2 * shape.I, shape.H, dtype=dtype, device=device)
    return lambda: left @ right.T


def _row(shape: Shape, piece: str, tile: Tile | None, times: list[float], reason: str = "") -> dict[str, Any]:
    milliseconds = statistics.median(times) if times else None
    flops = flops_of("gated_up" if piece == "dense" else piece, shape)
    return {
        "shape": shape.name,
        "piece": piece,
        "tile": "" if tile is None else _text_of(tile),
        "ms": milliseconds,
        "TFLOP/s": flops / milliseconds / 1e9 if milliseconds else None,
        "reason": reason,
    }


def _text_of(tile: Tile) -> str:
    """ "128x256x64 8 warps 3 stages" and what else differs from the default."""
    marks = [
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps {tile.num_stages} stages",
        "persistent" if tile.persistent else "",
        "TMA" if tile.tma else "",
        f"group {tile.group}" if tile.group != 8 else "",
        f"{tile.max_registers} registers" if tile.max_registers else "",
    ]
    return " ".join(filter(None, marks))


def tune_main(argv: Sequence[str]) -> None:
    """Compile, time, write and print."""
    (args,) = parse_arguments((TuneArguments,), argv, program="experts.py tune", description=__doc__)
    device = choose_device(args.device)
    shapes = args.chosen_shapes()
    if device.type == "cuda":
        seconds = tools.Stopwatch(device).wall_seconds(lambda: compile_candidates(args, device))
        print(f"compiled every candidate in {seconds:.0f} s")
    num_turns = sum(len(args.candidates(piece)) for piece in args.pieces or PIECES) * args.rounds * len(shapes)
    rows = []
    with tqdm(total=num_turns, desc="timing", unit="turn", mininterval=2) as progress:
        for shape in shapes:
            rows += tune_shape(shape, args, device, progress)
            release_memory(device)
    facts = machine_facts(device, args.commit)
    path = Path(args.output_dir) / "tiles.csv"
    write_csv(path, [{**row, **facts} for row in rows])
    print(text_table([{**row, "ms": row["ms"] and round(row["ms"], 3)} for row in rows]))
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}; written to {path}")


PROGRAMS = {"peers": peers_main, "tune": tune_main}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names, `peers` without one."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
