"""Which weights a step changes and whether that arrives: what is frozen, the optimizer by their type, what decays.

Parts of any causal LM are found through an adapter too, and kept frozen; fused experts beneath one are quantised.

A weight in bfloat16 or float16 takes up an update only if that is more than half the distance to its neighbour, some
|w| / 512 or |w| / 4096. torch's AdamW rounds to the nearest, so most updates of a continued training are lost; that of
`hf_moe_cpt.optim.adamw` rounds at random and loses none. Source: ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.training_args import OptimizerNames

from hf_moe_cpt.extras import is_installed, require
from hf_moe_cpt.machine import inner_model, local_part
from hf_moe_cpt.routing.hooks import find_experts, is_below, moe_layers
from hf_moe_cpt.trainers.common.distributed import norm_of


logger = logging.getLogger(__name__)

AUTO, STOCHASTIC, IN_FLOAT32 = "auto", "adamw_stochastic", OptimizerNames.ADAMW_TORCH_FUSED
BITS = {STOCHASTIC: 16, "adamw_stochastic_8bit": 8}  # of a moment
HALF = (torch.bfloat16, torch.float16)
SAMPLE = 1 << 16  # weights of a tensor that are looked at
WORTH_A_WARNING = 0.01  # share of updates that is lost
# Parts of names. What has one dimension is never decayed; these may have more.
UNDECAYED = re.compile(r"norm|bias|(^|[._])(a_log|sinks?|routers?|gate|shared_expert_gate)($|\.)", re.IGNORECASE)


@dataclass
class UpdateArguments:
    """How updates reach the weights. A mixin before `TrainingArguments`."""

    optim: str = HfArg(
        default=AUTO,
        help="Optimizer, by transformers' names; auto: adamw_torch_fused for float32 weights, "
        f"{STOCHASTIC} (bfloat16 weights and moments, rounded at random) for bfloat16 weights; "
        "adamw_stochastic_8bit: the same with a byte a moment.",
    )

    def __post_init__(self) -> None:
        """Refuse what nothing here reads; transformers checks the names of its own optimizers."""
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not part of this objective: losses are "
                "nats of the text itself; leave it at 0."
            )
        asked = self.optim
        if asked in (AUTO, *BITS):
            self.optim = IN_FLOAT32
        super().__post_init__()
        if asked in (AUTO, *BITS):
            self.optim = asked


def optimizer_for(weights: list[Tensor], is_deepspeed: bool = False) -> str:
    """The name that `optim="auto"` stands for with these trainable weights. DeepSpeed keeps float32 copies itself."""
    has_bfloat16 = any(weight.dtype == torch.bfloat16 for weight in weights)
    has_float16 = any(weight.dtype == torch.float16 for weight in weights)
    if not has_bfloat16 or has_float16 or is_deepspeed or not is_installed("triton"):
        return IN_FLOAT32.value
    return STOCHASTIC


@torch.no_grad()
def lost_share(weights: list[Tensor], learning_rate: float) -> float:
    """Share, in [0, 1], of the half-precision weights that stay what they are if the rate is added or taken away.

    A step of Adam changes a weight by about the rate at first and by less later, so at least this share of updates is
    lost. Counted on the weights themselves, at most `SAMPLE` of each tensor. 0 without such weights.
    """
    lost, counted = 0.0, 0
    for weight in weights:
        local = local_part(weight)
        if local.dtype not in HALF or not local.numel():
            continue
        values = local.flatten()[:: -(-local.numel() // SAMPLE)]
        stays = [(values.float() + sign * learning_rate).to(values.dtype) == values for sign in (1, -1)]
        lost += local.numel() * float((stays[0] & stays[1]).float().mean())
        counted += local.numel()
    return lost / counted if counted else 0.0


class UpdatesMixin:
    """Mixin in front of `Trainer`, whose arguments are `UpdateArguments`.

    Overrides `get_optimizer_cls_and_kwargs` (the optimizer by the weights' type), `create_optimizer` (says which, and
    what it loses), `_clip_grad_norm` and `get_decay_parameter_names` (matrices only, and no routers).
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """The parent's, and `adamw_stochastic`; `auto` goes by the trainable weights of `model`."""
        name = args.optim
        if name == AUTO:
            weights = [] if model is None else [weight for weight in model.parameters() if weight.requires_grad]
            name = optimizer_for(weights, bool(args.deepspeed))
        if name in BITS:
            from hf_moe_cpt.optim.adamw import StochasticAdamW  # needs Triton, which not every machine has

            betas = (args.adam_beta1, args.adam_beta2)
            return StochasticAdamW, {
                "lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "seed": args.seed,
                "bits": BITS[name],
            }  # fmt: skip
        args = copy(args)
        args.optim = OptimizerNames(name)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The parent's optimizer; one line says which it is, and a warning what it would lose."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.is_world_process_zero():
            self._tell_updates(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The parent's, of shards in one go; gradients of `StochasticAdamW` are scaled in its step: a pass less."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # of accelerate's wrapper
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        places = {place for grad in grads if isinstance(grad, DTensor) for place in grad.placements}
        is_late, is_elsewhere = hasattr(optimizer, "grad_scale"), self.is_deepspeed_enabled or self.accelerator.scaler
        if not grads or not (is_late or places) or is_elsewhere or any(place.is_partial() for place in places):
            return super()._clip_grad_norm(model)
        norm = norm_of(grads)
        scale = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch clips
        if is_late:
            optimizer.grad_scale = scale
        else:
            with torch.no_grad():
                torch._foreach_mul_([part for part in map(local_part, grads) if part.numel()], scale)
        return norm

    def _tell_updates(self, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        types = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
        name, rate = type(optimizer).__name__, self.args.learning_rate
        logger.info("Optimizer: %s (optim=%s) on %s weights.", name, self.args.optim, " and ".join(types))
        rounds_at_random = name == "StochasticAdamW" or "bf16_stochastic_round=True" in str(self.args.optim_args)
        if rounds_at_random or self.is_deepspeed_enabled:
            return
        lost = lost_share(weights, rate)
        if lost > WORTH_A_WARNING:
            logger.warning(
                "optim=%s rounds to the nearest: on these %s weights at least %.0f %% of the updates of a step at "
                "learning_rate=%g are lost. Leave optim at auto with bfloat16 weights, or load float32 weights.",
                getattr(self.args.optim, "value", self.args.optim),
                " and ".join(types),
                100 * lost,
                rate,
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices that are no embeddings, norms, biases, routers or states of a recurrence, in any model."""
        by_name = set(super().get_decay_parameter_names(model))
        embeddings = {
            id(w) for m in model.modules() if isinstance(m, nn.Embedding) for w in m.parameters(recurse=False)
        }
        return [
            name
            for name, weight in model.named_parameters()
            if name in by_name
            and len(getattr(weight, "ds_shape", weight.shape)) > 1
            and id(weight) not in embeddings
            and not UNDECAYED.search(name)
        ]


PARTS = ("router", "experts", "embeddings", "head", "norms")


@dataclass
class FreezeArguments:
    """What is not trained. A mixin before `TrainingArguments`."""

    freeze: list[str] | None = HfArg(
        default=None, help=f"Parts that are not trained: {', '.join(PARTS)}, or names of modules such as self_attn."
    )


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Stop training parts of a model, adapters on them included.

    parts: of PARTS, or names of modules as they stand in the model, such as self_attn or layers.0.mlp. Raises
    ValueError for a part that the model does not have, and where nothing is left to train.
    """
    parts = list(parts)
    for part in parts:
        roots = _modules_of(model, part)
        if not roots:
            raise ValueError(
                f"{part!r} is no part of {type(inner_model(model)).__name__} that could be frozen: choose from "
                f"{', '.join(PARTS)}, or name its modules, such as self_attn."
            )
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if any(is_below(name, root) for root in roots):
                parameter.requires_grad_(False)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Nothing is left to train when {', '.join(parts)} is frozen: freeze less.")


def _modules_of(model: nn.Module, part: str) -> list[str]:
    """Names of the modules that make up a part."""
    if part in ("router", "experts"):
        return [layer.router_name if part == "router" else layer.name for layer in moe_layers(model)]
    if part in ("embeddings", "head"):
        module = model.get_input_embeddings() if part == "embeddings" else model.get_output_embeddings()
        return [name for name, other in model.named_modules() if other is module]
    if part == "norms":
        return [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    return [name for name, _ in model.named_modules() if f".{name}.".endswith(f".{part}.")]


def quantise_experts(model: nn.Module, config: BitsAndBytesConfig | None = None) -> None:
    """Quantise the fused experts (E, ...) of a mixture in place, which transformers' quantisers pass over.

    model: with its adapter, if it gets one. config: by default the one that the model was loaded with; without one, in
    a dense model, and where it was done already, nothing happens. Weights are frozen, and are whole, in the type that
    they had, only while their layer runs; with gradients that is until the backward pass unless layers are
    checkpointed. `save_pretrained` of the model writes them rounded, in that type; of an adapter, the adapter alone.
    Raises ValueError for experts that are dealt to ranks, ImportError without bitsandbytes.
    """
    config = config or getattr(getattr(inner_model(model), "config", None), "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return
    held: set[int] = set()
    for experts in find_experts(model):
        if getattr(experts, "_is_expert_parallel", False):
            raise ValueError("Experts that are dealt to ranks cannot be quantised: leave out one of the two.")
        if not isinstance(experts.forward, _QuantisedForward):
            experts.forward = _QuantisedForward(experts, config)
            experts.register_state_dict_post_hook(_write_whole)
        held |= {id(tensor) for tensor in experts.forward.tensors()}
    named = [*model.named_parameters(), *model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = [name for name, tensor in named if id(tensor) in held]


class _QuantisedForward:
    """Forward of experts whose weights lie in buffers, in bitsandbytes' blocks.

    In the place of each stands one number that is repeated without memory: who counts or adapts weights sees shape and
    type. What is written there (a merged adapter) would be lost, and is refused.
    """

    def __init__(self, experts: nn.Module, config: BitsAndBytesConfig) -> None:
        self.experts, self.plain_forward, self.config = experts, experts.forward, config
        functional = self._functional()
        self.states: dict[str, Any] = {}
        self.places: dict[str, nn.Parameter] = {}
        for name, weight in list(experts.named_parameters(recurse=False)):
            if weight.ndim != 3:
                continue
            flat = weight.data.flatten()  # on a CPU bitsandbytes undoes rows narrower than a block wrongly
            if config.load_in_4bit:
                options = {"quant_type": config.bnb_4bit_quant_type}
                options["compress_statistics"] = config.bnb_4bit_use_double_quant
                codes, state = functional.quantize_4bit(flat, **options)
            else:
                codes, state = functional.quantize_blockwise(flat)
            experts.register_buffer(f"{name}_quantised", codes, persistent=False)
            self.states[name], self.places[name] = state, weight.requires_grad_(False)
            weight.data = flat[:1].clone().view(1, 1, 1).expand(weight.shape)

    @staticmethod
    def _functional() -> Any:  # not kept: modules of Python are not copied
        return require("bitsandbytes", needed_by="quantised experts").functional

    def tensors(self) -> list[torch.Tensor]:
        """What stands for weights, and the codes."""
        return [*self.places.values(), *(getattr(self.experts, f"{name}_quantised") for name in self.states)]

    @torch.no_grad()
    def whole(self, name: str) -> torch.Tensor:
        """A weight (E, ...) in the type that it had."""
        codes, state = getattr(self.experts, f"{name}_quantised"), self.states[name]
        state.to(codes.device)
        functional = self._functional()
        undo = functional.dequantize_4bit if self.config.load_in_4bit else functional.dequantize_blockwise
        return undo(codes, state).to(state.dtype).view(self.places[name].shape)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts' own forward, weights whole meanwhile, in autocast's type unless an adapter adds to them."""
        if any(place.stride(0) for place in self.places.values()):
            raise ValueError(
                "Something was written into quantised experts, such as a merged adapter, and is not computed with: "
                "merge it into the model loaded without quantisation."
            )
        given, device = {}, hidden_states.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for name in self.states:
            is_adapted = is_parametrized(self.experts, name)  # by peft, inside of its own forward
            holder, key = (self.experts.parametrizations[name], "original") if is_adapted else (self.experts, name)
            dtype = None if is_adapted else autocast
            given[name] = (holder._parameters, key, holder._parameters[key])
            holder._parameters[key] = nn.Parameter(self.whole(name).to(dtype=dtype), requires_grad=False)
        try:
            return self.plain_forward(hidden_states, *args, **kwargs)
        finally:
            for parameters, key, place in given.values():
                parameters[key] = place


def _write_whole(experts: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook on `state_dict`: what is saved is what is computed with. Of peft's models only the adapter is saved."""
    if not prefix.startswith("base_model."):
        state.update({f"{prefix}{name}": experts.forward.whole(name).cpu() for name in experts.forward.states})
