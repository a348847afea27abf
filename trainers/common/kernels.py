"""Full speed on a GPU for any causal LM of transformers that a trainer is given: one switch, one line that tells.

| part | `kernels="auto"` on a GPU |
|---|---|
| attention of packed documents | transformers' `flex_attention`, where its `sdpa` was in force |
| routed experts | ours (`experts_implementation="hf_moe_cpt"`), where transformers' own choice was in force |
| head and loss | one, in chunks, without logits (`kernels.cross_entropy.fuse_head`) |
| norms, rotation, residuals, gates | each decoder layer is compiled; a mixture's router and experts run as they are |

Only the model at hand is changed, by attributes of its modules: classes, functions and other models stay. The block
that holds router and experts is left out of the compiled graph, because hooks on them hear what is routed, and a graph
hears the hooks of its first step for ever. Passes without gradient, as in an evaluation, are not compiled: they would
double the time of compiling. Source: ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from hf_moe_cpt.kernels.experts_interface import DISTRIBUTED, HAS_TRITON, why_unsupported
from hf_moe_cpt.machine import inner_model, modes_kept, own_penalty_off
from hf_moe_cpt.routing.hooks import find_experts, is_below, moe_layers
from hf_moe_cpt.trainers.common.distributed import reshard


logger = logging.getLogger(__name__)

KERNELS = ("auto", "plain")
OURS = "hf_moe_cpt"
# transformers' own functions, without its list of families: `choose_attention` looks at what a model makes of them.
FLEX = "hf_moe_cpt_flex"
MIN_HEAD_DIM, FLEX_BLOCK = 16, 128  # of FlexAttention: below, it has no kernel or another one
DECLINES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError)
MAX_MOVED = 0.1  # share of the logits that rounding and the experts it makes change places may move
OF_TRANSFORMERS = (None, "grouped_mm", "eager")  # what a model has that nobody chose an implementation for


AttentionInterface.register(FLEX, flex_attention_forward)
AttentionMaskInterface.register(FLEX, flex_attention_mask)


@dataclass
class KernelArguments:
    """How fast the model runs. A mixin before `TrainingArguments`."""

    kernels: str = HfArg(
        default="auto",
        help="auto: on a GPU our experts, a head fused with its loss, compiled layers, for any model; "
        "plain: the model as transformers runs it.",
    )

    def __post_init__(self) -> None:
        """Refuse other values."""
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels={self.kernels!r} is unknown: choose one of {', '.join(KERNELS)}.")
        super().__post_init__()


def use_kernels(model: nn.Module, args: TrainingArguments, fuses_head: bool) -> list[str]:
    """Make one model fast as `args.kernels` says, and return what was chosen, and what not and why.

    model: before it is wrapped for several ranks. fuses_head: whether the trainer needs no logits with labels.
    Several devices in one process (`DataParallel`) copy a model, and what is set here stays with the original.
    """
    if not _are_wanted(args):
        return []
    inner = inner_model(model)
    told = [choose_experts(inner, args.device, torch.bfloat16 if args.bf16 else None)]
    if fuses_head:
        from hf_moe_cpt.kernels.cross_entropy import fuse_head, why_not_fused

        reason = why_not_fused(inner) if HAS_TRITON else "the package triton is not installed"
        if reason is None:
            fuse_head(inner, in_evaluation=True)
        told.append("head fused with its loss" if reason is None else f"head not fused with its loss ({reason})")
    if not args.use_liger_kernel and not args.torch_compile:
        try:
            told.append(f"{compile_layers(inner)} layers compiled")
        except ValueError as error:  # a router that nobody finds, whose hooks a graph would hear for ever
            told.append(f"layers not compiled ({error})")
    told = [part for part in told if part]
    logger.info("Kernels of %s: %s.", type(inner).__name__, ", ".join(told))
    return told


def _are_wanted(args: TrainingArguments) -> bool:
    return args.kernels != "plain" and args.device.type == "cuda" and args.n_gpu <= 1


def choose_attention(model: nn.Module, args: TrainingArguments, max_length: int) -> None:
    """Let FlexAttention run packed documents, on the device: with a mask, sdpa computes what it then throws away.

    Measured on an H200, 8 x 2,048 tokens, 16 heads of 128, forward and backward: 1.05 ms a layer, sdpa 3.29 ms. It is
    taken where logits stay what they were but for rounding, before the documents are shown to be apart; not while
    weights are elsewhere than on the GPU, whole or sharded. max_length: of a row, in tokens. A collective where ranks
    share the model.
    """
    is_there = all(type(weight) in (nn.Parameter, DTensor) and weight.is_cuda for weight in model.parameters())
    if not (_are_wanted(args) and is_there and max_length >= FLEX_BLOCK):
        return
    inner = inner_model(model)
    config = inner.config.get_text_config()
    if config._attn_implementation != "sdpa" or not inner._supports_sdpa:
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < MIN_HEAD_DIM:
        return
    before = _probe_logits(inner, config.vocab_size)
    inner.set_attn_implementation(FLEX)
    try:
        moved = (_probe_logits(inner, config.vocab_size) - before).norm() / before.norm()
        reason = None if moved < MAX_MOVED else f"logits moved by {moved:.0%}"
    except DECLINES as error:  # whatever a family or the compiler has against it
        reason = str(error).strip().partition("\n")[0]
    if reason is not None:
        logger.info("%s keeps sdpa for packed documents: with FlexAttention %s.", type(inner).__name__, reason)
        inner.set_attn_implementation("sdpa")


@torch.no_grad()
def _probe_logits(model: PreTrainedModel, vocab_size: int) -> Tensor:
    """Logits of two packed documents of `FLEX_BLOCK` tokens together, in evaluation mode."""
    ids = (7 * torch.arange(FLEX_BLOCK, device=next(model.parameters()).device)[None] + 1) % vocab_size
    positions = torch.arange(FLEX_BLOCK // 2, device=ids.device).repeat(1, 2)
    with modes_kept(model), torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        options = {"use_cache": False} | own_penalty_off(model)  # asked for routers once, recorders stay on all layers
        try:
            return model.eval()(input_ids=ids, position_ids=positions, **options).logits.float()
        finally:
            reshard(model)


def choose_experts(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> str:
    """Let our kernels run the routed experts where they can and nobody chose otherwise; "" for a dense model.

    dtype: of the products, that of autocast; None: of the weights.
    """
    experts = find_experts(model)
    if not experts:
        return ""
    chosen = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if chosen not in OF_TRANSFORMERS:
        return f"experts {chosen}"
    reasons = {_why_not(module, device, dtype) for module in experts} - {None, DISTRIBUTED}
    if not reasons and not model._can_set_experts_implementation():
        reasons = {"the model class does not let its experts be chosen"}
    if reasons:
        return f"experts {chosen} ({'; '.join(sorted(reasons))})"
    model.set_experts_implementation(OURS)
    return f"experts {OURS}"


def _why_not(experts: nn.Module, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if not hasattr(experts, "has_gate"):  # set by transformers' decorator, which reads the implementation
        return f"{type(experts).__name__} has one way to run"
    return why_unsupported(experts, device, dtype or experts.gate_up_proj.dtype)


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile each decoder layer by itself, but for the blocks that route; returns how many layers there are.

    A layer that the compiler cannot take runs as before, and so do all others then, after one line that says why.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)}
    blocks = {layer.name.rpartition(".")[0]: layer.router_name for layer in moe_layers(model, lone_routers=True)}
    heard = {name for block, router in blocks.items() for name in (block, router) if not is_below(router, block)}
    kept = [
        part for name, part in layers.items() if name not in blocks and not any(is_below(at, name) for at in heard)
    ]
    uncompiled: dict[type, Callable] = {}  # one function a class: the compiler tells layers apart by theirs
    for block in map(model.get_submodule, blocks):
        forward = uncompiled.setdefault(type(block), torch.compiler.disable(type(block).forward))
        block.forward = MethodType(forward, block)
    if model.config.get_text_config()._attn_implementation != "eager":  # others have no weights to record
        silence_while_compiled(kept)
    for layer in kept:
        layer.compile(backend=backend)
        layer._compiled_call_impl = _CompiledCall(layer, layer._compiled_call_impl, kept, backend)
    return len(kept)


def silence_while_compiled(layers: list[nn.Module]) -> None:
    """Let transformers' recorders of attention weights, which no graph can hold, be no end of a layer's graph."""

    def silenced(record: Callable) -> Callable:
        return lambda *args: None if torch.compiler.is_compiling() else record(*args)

    for part in {below for layer in layers for below in layer.modules()}.difference(layers):
        for key, hook in part._forward_hooks.items():
            if hook.__module__ == output_capturing.__name__:
                part._forward_hooks[key] = silenced(hook)


class _CompiledCall:
    """A layer's compiled call where it is trained (with gradient, no cache), else, or if that fails, its own."""

    def __init__(self, layer: nn.Module, compiled: Callable, layers: list[nn.Module], backend: str) -> None:
        self.layer, self.compiled, self.layers, self.backend = layer, compiled, layers, backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in kwargs.values()):
            return self.layer._call_impl(*args, **kwargs)
        run = getattr(self.layer, "_gradient_checkpointing_func", None)
        is_inside = type(self.layer).__call__ is not nn.Module.__call__  # of checkpointing already, before 5.24
        if run is not None and self.layer.gradient_checkpointing and self.layer.training and not is_inside:
            if not isinstance(run, _CompiledInside):
                self.layer._gradient_checkpointing_func = _CompiledInside(run, self.backend)
            return self._tried(self.layer._call_impl, args, kwargs)
        return self._tried(self.compiled, args, kwargs)

    def _tried(self, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            return call(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            logger.warning(
                "%s cannot be compiled (%s): its layers run as transformers runs them.",
                type(self.layer).__name__,
                str(error).strip().partition("\n")[0],
            )
            for layer in self.layers:
                layer._compiled_call_impl = None
                run = getattr(layer, "_gradient_checkpointing_func", None)
                if isinstance(run, _CompiledInside):
                    layer._gradient_checkpointing_func = run.run
            return self.layer._call_impl(*args, **kwargs)


class _CompiledInside:
    """Checkpointing of a layer that compiles what is computed again: the compiler leaves out what checkpointing calls.

    A function of a class of layers is compiled once for all of them.
    """

    _compiled: ClassVar[dict[tuple[Callable, Any], Callable]] = {}

    def __init__(self, run: Callable, backend: str) -> None:
        self.run, self.backend = run, backend

    def __call__(self, part: partial, *args: Any) -> Any:
        key = part.func, self.backend
        if key not in self._compiled:
            self._compiled[key] = torch.compile(part.func, backend=self.backend)
        return self.run(partial(self._compiled[key], *part.args, **part.keywords), *args)
