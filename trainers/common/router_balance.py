"""One switch that keeps the experts of any mixture balanced, in any Trainer: a penalty, or an update of biases.

It listens to the routers and experts of a model and never reads its own loss, whose penalty is switched off: that one
pools all layers, counts once for every micro-batch and rank, and is there in evaluation too.

`aux`, the penalty of a micro-batch, minimised with its loss (Switch Transformers eq. 4, one for each layer):
    coef * sum over layers of E sum_i f_i P_i  +  z_coef * sum over layers of mean logsumexp(z)^2
    P_i  mean over the tokens of the micro-batch of softmax(z)_i, with gradient
    f_i  share of the assignments that went to expert i, of the experts that were really run, without gradient
P and the mean are weighted by the share of the optimizer batch's tokens that the micro-batch holds, so that they are
those of the whole batch for any accumulation and number of ranks. f counts over all ranks (`load_scope="global"`) and
over the micro-batches of the step so far, the buffer of global-batch balancing (arXiv 2501.11873). What is exact: with
one micro-batch a step the penalty is that of the whole batch on one process, whatever the number of ranks. With
accumulation only the last micro-batch sees the f of the whole batch, earlier ones that of what came before and with
them; later ones cannot be known.

`bias`, for routers that choose by score + b (DeepSeek-V3, arXiv 2412.19437; arXiv 2408.15664), once a step, exactly:
    b_i += rate * sign(mean of the loads - load_i)     the loads of all micro-batches and ranks

Padding takes no part. Letters: L MoE layers, T tokens of a call, E experts, K experts per token, z router logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.machine import has_process_group, inner_model, own_penalty_off
from hf_moe_cpt.reading import reading
from hf_moe_cpt.routing.hooks import (
    MoeLayer,
    checkpoints_reentrantly,
    expert_fields,
    find_experts,
    layers_to_watch,
)
from hf_moe_cpt.routing.metrics import router_distribution
from hf_moe_cpt.trainers.common.metrics import MeanMeter
from hf_moe_cpt.trainers.common.router_monitor import ExpertLoadMeter, by_layer, token_mask


logger = logging.getLogger(__name__)

WAYS = ("auto", "aux", "bias", "sinkhorn", "none")
LOAD_SCOPES = ("global", "rank")
OUR_MODEL_TYPE = "cpt_moe"
CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias")  # the last part of the name, in every family
PENALTIES = ("router_aux_loss_coef", "router_z_loss_coef")
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # of a configuration: JetMoE's, DBRX's
DEFAULT_COEFFICIENT = 0.01  # Switch Transformers, section 2.2
# gpt-oss says 0.9, for the pooled penalty: for each layer it balanced no better than 0.1 and cost 0.003 to 0.013 nats.
MAX_OF_CONFIG = 0.1
BIAS_FILE = "router_bias.safetensors"
REENTRANT = (
    "Reentrant gradient checkpointing cuts the routers off from their penalty: set "
    "gradient_checkpointing_kwargs={\"use_reentrant\": False}, or router_balance='none' and router_z_loss_coef=0."
)


@dataclass
class RouterBalanceArguments:
    """How the experts of a mixture are kept balanced. A mixin before `TrainingArguments`."""

    router_balance: str = HfArg(
        default="auto",
        metadata={"choices": list(WAYS)},
        help="How the load of experts is balanced: aux, a penalty for each layer; bias, an update of the "
        "routers' correction biases; sinkhorn, the routers of such a cpt_moe model do it; none; auto: what the "
        "model is made for.",
    )
    router_aux_loss_coef: float | None = HfArg(
        default=None,
        help="Coefficient of the penalty, which is 1 for each layer in balance. Unset: the configuration's if "
        f"it is not the default of its class, at most {MAX_OF_CONFIG}, else {DEFAULT_COEFFICIENT}; of a cpt_moe "
        "model always its own.",
    )
    router_z_loss_coef: float | None = HfArg(
        default=None, help="Coefficient of the router z-loss of each layer. Unset: the configuration's, else 0."
    )
    router_bias_update_rate: float = HfArg(default=1e-3, help="How far a correction bias moves in a step.")
    load_scope: str | None = HfArg(
        default=None,
        metadata={"choices": list(LOAD_SCOPES)},
        help="Where the penalty counts the load of experts: global, over all ranks; rank. Unset: the "
        "configuration's, else global.",
    )

    def __post_init__(self) -> None:
        """Refuse what no model can follow, before anything is loaded."""
        for name, allowed in (("router_balance", WAYS), ("load_scope", (None, *LOAD_SCOPES))):
            if getattr(self, name) not in allowed:
                told = ", ".join(choice for choice in allowed if choice)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {told}.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be a finite number, at least 0.")
        way, coefficient = self.router_balance, self.router_aux_loss_coef
        if way == "aux" and coefficient == 0.0:
            raise ValueError(
                "router_balance='aux' with router_aux_loss_coef=0 balances nothing: give the coefficient a value such "
                f"as {DEFAULT_COEFFICIENT}, or set router_balance='none'."
            )
        if way == "bias" and not self.router_bias_update_rate:
            raise ValueError("router_balance='bias' with router_bias_update_rate=0 moves nothing: 0.001 is usual.")
        if coefficient and way in ("bias", "sinkhorn", "none"):
            raise ValueError(
                f"router_balance={way!r} has no penalty, and router_aux_loss_coef={coefficient} is the weight of one: "
                "set one of the two."
            )
        super().__post_init__()


@dataclass(frozen=True)
class Decision:
    """What a run does with a model's routers."""

    way: str  # of WAYS, never auto
    coefficient: float = 0.0  # of the penalty
    z_coefficient: float = 0.0
    load_scope: str = "global"


def decide(
    args: RouterBalanceArguments, model: nn.Module, layers: list[MoeLayer], has_bias: bool, is_fixed: bool = False
) -> Decision:
    """What `args` mean for a model. Raises ValueError, in one line, for what it cannot follow.

    has_bias: whether its routers choose by a correction bias. is_fixed: whether routers are not to change.
    """
    name, config = type(inner_model(model)).__name__, inner_model(model).config.get_text_config()
    if not layers:
        _refuse_for_dense(args, name)
        return Decision("none")
    is_ours = config.model_type == OUR_MODEL_TYPE
    own = "sinkhorn" if getattr(config, "router_type", None) == "sinkhorn" else "bias" if has_bias else "aux"
    _refuse_other_ways(args, name, own, is_fixed)
    if is_fixed:
        return Decision("none")
    pays = not is_ours or config.has_router_penalty
    way, coefficient, z_coefficient = args.router_balance, args.router_aux_loss_coef, args.router_z_loss_coef
    if z_coefficient is None:
        z_coefficient = (getattr(config, "router_z_loss_coef", None) or 0.0) if pays else 0.0
    if coefficient is None:
        coefficient = _coefficient_of(config) if not is_ours else config.router_aux_loss_coef if pays else 0.0
    way = own if way == "auto" else way
    if way == "aux" and not coefficient:
        if args.router_balance == "aux":
            raise ValueError(
                "router_balance='aux' and the coefficient of the configuration is 0: set router_aux_loss_coef, e.g. "
                f"{DEFAULT_COEFFICIENT}, or router_balance='none'."
            )
        way = "none"
    scope = args.load_scope or (config.load_scope if is_ours else "global")
    return Decision(way, coefficient if way == "aux" else 0.0, z_coefficient, scope)


def _refuse_other_ways(args: RouterBalanceArguments, name: str, own: str, is_fixed: bool) -> None:
    """own: the way that the routers of a model are made for."""
    asked = args.router_balance
    if asked not in ("auto", "none", own):
        how = {
            "sinkhorn": "balance by their own plan",
            "bias": "choose by a correction bias, which a penalty would work against",
            "aux": "have neither a correction bias nor a plan",
        }[own]
        raise ValueError(f"router_balance={asked!r}: the routers of {name} {how}; set {own}, auto or none.")
    if is_fixed and asked in ("aux", "bias"):
        raise ValueError(f"router_balance={asked!r} moves routers, which this run keeps fixed: set auto or none.")
    of_way = {"router_aux_loss_coef": "aux", "load_scope": "aux", "router_bias_update_rate": "bias"}
    for field_name, way in of_way.items():
        value, default = getattr(args, field_name), getattr(RouterBalanceArguments, field_name)
        if value not in (default, 0.0) and way != (own if asked == "auto" else asked):
            raise ValueError(
                f"{field_name}={value!r} is read with router_balance={way!r} alone, and the routers of {name} are "
                f"balanced by {own if asked == 'auto' else asked}: leave it unset."
            )


def _refuse_for_dense(args: RouterBalanceArguments, name: str) -> None:
    told = [f"{name}={value}" for name in PENALTIES if (value := getattr(args, name))]
    if args.router_balance not in ("auto", "none"):
        told.append(f"router_balance={args.router_balance!r}")
    if told:
        raise ValueError(f"{', '.join(told)}: no routers of {name} are known to balance; leave this unset.")


def _coefficient_of(config: Any) -> float:
    """The coefficient that somebody chose for another family's model, whatever it is called there, or the default.

    A value that is the default of its class was chosen by nobody: 0.001 in most, for the pooled penalty, which leaves
    the busiest expert at 1.8 to 3.6 times its share where 0.01 gets it to 1.4 (docs/cpt.md).
    """
    for part in (config, getattr(config, "ffn_config", None)):  # where DBRX keeps it
        for name in COEFFICIENTS:
            value = getattr(part, name, None) or 0.0
            if 0.0 < value <= MAX_OF_CONFIG and value != getattr(type(part), name, None):
                return float(value)
    return DEFAULT_COEFFICIENT


def _layers_to_balance(model: nn.Module, way: str) -> list[MoeLayer]:
    """Every MoE layer; none in a dense model. Raises ValueError for routers that nobody finds, unless way is none."""
    if not find_experts(model) and not expert_fields(model):
        return []
    try:
        return layers_to_watch(model, lone_routers=True)
    except ValueError as error:
        if way == "none":
            return []
        raise ValueError(f"{error} Or train it without any balance: router_balance='none'.") from None


def correction_biases(model: nn.Module, layers: Sequence[MoeLayer]) -> list[tuple[int, nn.Module, str]]:
    """Of each buffer or parameter (E,) that a router chooses by: place of the layer, module and attribute."""
    found = []
    for place, layer in enumerate(layers):
        block = model.get_submodule(layer.name.rpartition(".")[0])
        for module in block.modules():
            own = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
            found += [
                (place, module, name)
                for name, value in own.items()
                if name in CORRECTION_BIASES and value.numel() == layer.num_experts
            ]
    return found


class RouterBalance:
    """Keeps the experts of a model balanced through a run, as the head of this file says.

    The trainer makes it once the model has its adapter. At each optimizer step it calls `begin_step`; for each
    micro-batch it runs the model inside `observe`, with the keywords of `switched_off`, and takes `added_to` as loss;
    `end_step` closes the step. `RouterBalanceMixin` has what is the same in all trainers.

    args: the settings. log_load: whether `pop` tells the balance that was reached. is_fixed: whether routers are not
    to change; auto then means none. Raises ValueError, in one line, for settings that the model cannot follow.
    """

    def __init__(self, args: Any, model: nn.Module, log_load: bool = False, is_fixed: bool = False) -> None:
        self.layers = _layers_to_balance(model, args.router_balance)
        self._biases = correction_biases(model, self.layers)
        is_fixed = is_fixed or "router" in (getattr(args, "freeze", None) or ()) or _is_fixed(model, self.layers)
        self.decision = decide(args, model, self.layers, bool(self._biases), is_fixed)
        self.model, self.rate, self.log_load = model, args.router_bias_update_rate, log_load
        self.moves_bias = self.decision.way == "bias"
        self.is_penalised = self.decision.coefficient > 0 or self.decision.z_coefficient > 0
        _refuse_environment(args, model, self.is_penalised)
        listens = self.layers and (log_load or self.is_penalised or self.moves_bias)
        self.meter = ExpertLoadMeter(model) if listens else None
        self.terms = MeanMeter()
        self.switched_off = own_penalty_off(model)
        self._heard: list[tuple[int, Tensor]] = []
        self._keep: Tensor | None = None
        self._tokens_of_step: Tensor | None = None
        if self.moves_bias:
            for bias in self.biases().values():
                bias.requires_grad_(False)
                if bias.dtype in (torch.float16, torch.bfloat16):  # in which an update would be lost
                    bias.data = bias.data.float()

    def biases(self) -> dict[str, Tensor]:
        """The correction biases by their names in the model without its wrappers."""
        names = {id(module): name for name, module in inner_model(self.model).named_modules()}
        return {f"{names[id(module)]}.{name}": getattr(module, name) for _, module, name in self._biases}

    def __str__(self) -> str:
        """What is used, with which numbers, in one line."""
        way, where = self.decision.way, f"{len(self.layers)} MoE layers of {type(inner_model(self.model)).__name__}"
        how = {
            "aux": f"a penalty for each layer, router_aux_loss_coef={self.decision.coefficient:g}, load counted "
            f"over {'all ranks' if self.decision.load_scope == 'global' else 'each rank'}",
            "bias": f"updates of {len(self._biases)} correction biases, router_bias_update_rate={self.rate:g}",
            "sinkhorn": "their own plan",
            "none": "nothing",
        }[way]
        z_loss = f"; router_z_loss_coef={self.decision.z_coefficient:g}" if self.decision.z_coefficient else ""
        return f"Router balance: {where} are balanced by {how}{z_loss}."

    def begin_step(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Forget the last step and count the tokens of all micro-batches of all ranks (a collective, no host sync)."""
        if self.meter is None:
            return
        self.meter.restart()
        if self.is_penalised:
            self._tokens_of_step = torch.stack([num_routed(batch).to(device) for batch in batches]).sum()
            if has_process_group():
                dist.all_reduce(self._tokens_of_step)

    @contextmanager
    def observe(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Listen to one forward pass in training over this batch; recomputation by checkpointing is outside of it."""
        if self.meter is None:
            yield
            return
        self._keep, self._heard = token_mask(batch), []
        with self.meter.observe(self._keep, self._heard if self.is_penalised else None):
            yield

    def added_to(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """The loss of the micro-batch that was observed last with its part of the penalty of the optimizer batch.

        scale: by what the sum of all these losses, over micro-batches and ranks, is divided until it is a gradient.
        Without `begin_step` the micro-batch counts as the whole batch. A collective with load_scope="global".
        """
        heard, self._heard = self._heard, []
        if not heard:
            return loss
        self._refuse_cut_gradient(heard)
        terms = self._terms(heard)
        tokens = heard[0][1].shape[0] if self._keep is None else self._keep.sum().to(heard[0][1].device)
        self.terms.add({name: (term * tokens, tokens) for name, term in terms.items()})
        coefficients = {"aux_loss": self.decision.coefficient, "z_loss": self.decision.z_coefficient}
        penalty = sum(coefficients[name] * term for name, term in terms.items())
        if self._tokens_of_step is not None:
            penalty = penalty * (scale * tokens / self._tokens_of_step).to(penalty.device)
        return loss + penalty.to(loss.device)

    def _terms(self, heard: list[tuple[int, Tensor]]) -> dict[str, Tensor]:
        """The penalties of a micro-batch before their coefficients, sums over layers; only those that are wanted."""
        device, terms = heard[0][1].device, {}
        stacks = _stacked(heard)
        if self.decision.coefficient:
            rows = self.meter.load(over_ranks=self.decision.load_scope == "global").unbind()
            counts = (torch.stack([rows[place] for place in places]) for places, _ in stacks)
            parts = (
                balance_loss(z, n[:, : z.shape[-1]], self._keep) for n, (_, z) in zip(counts, stacks, strict=True)
            )
            terms["aux_loss"] = sum(part.sum().to(device) for part in parts)
        if self.decision.z_coefficient:
            parts = (mean_over_tokens(_wide(z).logsumexp(dim=-1).square(), self._keep) for _, z in stacks)
            terms["z_loss"] = sum(part.sum().to(device) for part in parts)
        return terms

    def _refuse_cut_gradient(self, heard: list[tuple[int, Tensor]]) -> None:
        if not torch.is_grad_enabled() or any(logits.requires_grad for _, logits in heard):
            return
        if any(weight.requires_grad for layer in self.layers for weight in layer.router.parameters()):
            raise ValueError(REENTRANT)

    def end_step(self) -> None:
        """Take the load of the step together over ranks, and move the biases by it."""
        counts = None if self.meter is None else self.meter.end_step()
        if counts is None or not self.moves_bias:
            return
        with torch.no_grad():
            for place, module, name in self._biases:
                bias = getattr(module, name)
                move = bias_update(counts[place, : bias.numel()].to(bias.device), self.rate)
                move = move.view(bias.shape).to(bias.dtype)
                if isinstance(bias, DTensor):
                    move = distribute_tensor(move, bias.device_mesh, bias.placements)
                bias.add_(move)

    def pop(self) -> dict[str, float]:
        """For a training log, since the last one: `aux_loss` and `z_loss`, sums over layers before coefficients (1 a
        layer is perfect balance); `bias_range`, largest - smallest bias of the layer where that is largest; with
        log_load `mri` and `mri_normalized`, also of each layer.
        """
        found = self.terms.pop()
        load = {} if self.meter is None else self.meter.pop()
        if self.log_load:
            found |= by_layer({name: values for name, values in load.items() if name.startswith("mri")})
        if self.moves_bias:
            ranges = [torch.stack(_whole(bias).aminmax()).diff().cpu() for bias in self.biases().values()]
            found["bias_range"] = torch.stack(ranges).max().item()
        return found


def _is_fixed(model: nn.Module, layers: Sequence[MoeLayer]) -> bool:
    """Whether routers were frozen, or nothing that they see is trained. An adapter freezes what it stands beside."""
    if hasattr(model, "peft_config"):
        return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return not any(weight.requires_grad for layer in layers for weight in layer.router.parameters())


def _refuse_environment(args: Any, model: nn.Module, is_penalised: bool) -> None:
    if not is_penalised:
        return
    given = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    if checkpoints_reentrantly(model) or (
        getattr(args, "gradient_checkpointing", False) and given.get("use_reentrant")
    ):
        raise ValueError(REENTRANT)
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, over which no penalty of routers can be taken: start with torchrun "
            "or accelerate launch, one each, or set router_balance='none'."
        )


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _whole(bias: Tensor) -> Tensor:
    return bias.full_tensor() if isinstance(bias, DTensor) else bias.detach()


def mean_over_tokens(values: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of values (T, ...) over the tokens that keep (of T elements) is true for; of all without it; 0 of none."""
    if keep is None:
        return values.mean(dim=0)
    mask = keep.to(values.device).reshape(-1, *[1] * (values.ndim - 1)).bool()
    return torch.where(mask, values, 0.0).sum(dim=0) / mask.sum().clamp(min=1)


def _stacked(heard: Sequence[tuple[int, Tensor]]) -> list[tuple[list[int], Tensor]]:
    """Places and logits (T, L, E) of the L layers that are alike: a few launches for all of them in place of each."""
    alike: dict[tuple, list[tuple[int, Tensor]]] = {}
    for place, logits in heard:
        alike.setdefault((logits.shape, logits.dtype, logits.device), []).append((place, logits))
    return [([place for place, _ in group], torch.stack([z for _, z in group], dim=1)) for group in alike.values()]


def balance_loss(logits: Tensor, counts: Tensor, keep: Tensor | None = None) -> Tensor:
    """E sum_i f_i P_i, in (0, E], 1 where routing is uniform; gradient through P only.

    logits: (T, E) of one layer, or (T, L, E). counts: (E,) or (L, E), how often each expert was run, by any tokens.
    keep: as in `mean_over_tokens`. Returns a scalar or (L,).
    """
    g = mean_over_tokens(router_distribution(logits), keep)
    counts = counts.to(g)
    return logits.shape[-1] * (counts / counts.sum(-1, keepdim=True).clamp(min=1) * g).sum(-1)


def bias_update(counts: Tensor, rate: float) -> Tensor:
    """rate * sign(mean load - load), (E,): what a step adds to a correction bias; counts: (E,) loads of the step."""
    load = counts.double()
    return rate * torch.sign(load.mean() - load)


def num_routed(batch: Mapping[str, Any]) -> Tensor:
    """How many tokens of a batch routers are to balance, 0-d."""
    mask = token_mask(batch)
    return torch.full((), batch["input_ids"].numel(), device=batch["input_ids"].device) if mask is None else mask.sum()


def load_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Set the correction biases that were saved beside an adapter in a folder; nothing where there are none."""
    path = Path(folder) / BIAS_FILE
    if not path.is_file():
        return
    inner = inner_model(model)
    with reading(path), torch.no_grad():
        for name, saved in load_file(path).items():
            module, _, attribute = name.rpartition(".")
            bias = getattr(inner.get_submodule(module), attribute)
            saved = saved.to(bias.device)
            bias.copy_(
                distribute_tensor(saved, bias.device_mesh, bias.placements) if isinstance(bias, DTensor) else saved
            )


class BalanceCallback(TrainerCallback):
    """Says how routers are balanced when training begins, and closes the steps."""

    def __init__(self, balance: RouterBalance) -> None:
        self.balance = balance

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One line on the first process."""
        if self.balance.layers and state.is_world_process_zero:
            logger.warning("%s", self.balance)  # an info is seen by nobody who did not ask for it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the step is logged and saved."""
        self.balance.end_step()


class RouterBalanceMixin:
    """Mixin in front of a `Trainer` with `FaultTolerantMixin`, which calls `balance_routers` when it is built.

    Overrides `get_batch_samples` (tokens of the step), `log`, and `save_model`, `read_beside_state` and
    `_load_best_model` (biases of a model whose checkpoints hold only an adapter).
    """

    balance: RouterBalance

    def balance_routers(self, balance: RouterBalance) -> None:
        """Use `balance` through all steps."""
        self.balance = balance
        self.add_callback(BalanceCallback(balance))

    def routed_batch(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a micro-batch whose routing is balanced."""
        return sample

    def penalty_scale(self, is_summed: bool) -> int:
        """What `added_to` takes; is_summed: losses of micro-batches add up, the trainer takes no mean over them."""
        parts = getattr(self, "current_gradient_accumulation_steps", 1)  # set by `train`
        return self.accelerator.num_processes * (1 if is_summed else parts)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The parent's; counts the tokens of the step."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            self.balance.begin_step([self.routed_batch(sample) for sample in samples], device)
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's; a training log gets the penalties and the balance, also the last of a run without any."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self.balance.pop())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; beside an adapter, which does not hold them, the biases that have moved."""
        super().save_model(output_dir, _internal_call)
        if self.balance.moves_bias and hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            biases = {name: _whole(bias).cpu().contiguous() for name, bias in self.balance.biases().items()}
            if self.args.should_save:
                save_file(biases, Path(output_dir or self.args.output_dir) / BIAS_FILE)

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """The parent's, and the biases that lie beside an adapter."""
        super().read_beside_state(checkpoint)
        if checkpoint is not None:
            load_router_bias(self.model, checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_router_bias(self.model, self.state.best_model_checkpoint)
