"""Several ranks: what is sharded over them, what they tell each other beside training, and how they are left. Ours."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DynamoBackend, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe_cpt.kernels.expert_parallel import (
    keep_exchanges,
    keep_gates,
    overlap_shared_experts,
    tell_numbers_of_tokens,
)
from hf_moe_cpt.machine import has_process_group, inner_model, local_part


SPARE_MEMORY = 0.08  # share of a GPU that is left to the driver, communication, pieces and longer batches


def reshard(model: nn.Module) -> None:
    """Let every part of a model that FSDP2 shards hold its shards again, of which optimizers are made.

    A pass without a backward leaves the last part gathered: an optimizer made then would train tensors that are thrown
    away.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_in_float32(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let FSDP2 sum gradients over ranks in float32, and hand out losses as they are.

    accelerate's policy for mixed precision does both in the short type, and a loss of 12.2488 is logged as 12.25. A
    policy that somebody chose stays as it is. Raises ValueError for FSDP's first version, whose flat pieces of weights
    have none of this, no norms of their own and no decay by shape.
    """
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported: set fsdp_version: 2, as in fsdp2_8gpu.yaml.")
    policy = None if plugin is None else plugin.mixed_precision_policy
    if not isinstance(policy, MixedPrecisionPolicy) or policy.param_dtype not in (torch.bfloat16, torch.float16):
        return
    if policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def reduce_at_once(model: nn.Module) -> None:
    """Let FSDP2 reduce the gradients of the next backward pass in it, also where accumulation would put it off.

    What is put off lies where nobody can take it apart again.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
        model.set_requires_all_reduce(True)


def ranks_of_a_row(model: nn.Module, args: Any) -> int:
    """Ranks that are given the same rows, since they share tensors, as `Trainer.get_tp_size` has it."""
    of_launcher = getattr(args.parallelism_config, "tp_size", 1)
    return getattr(inner_model(model), "_tp_size", None) or of_launcher or 1


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model, by accelerate or by transformers' `DistributedConfig`."""
    return isinstance(model, FSDPModule)


def shard_early(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether accelerate's FSDP2 sharded a model, in place, before `Trainer` asks for it; it takes it as it is then.

    What is measured before training is then of the weights that training uses: gathered, and in its type. Not where
    accelerate has something to do before it shards: its own checkpointing, a compiled model.
    """
    plugin, compiler = accelerator.state.fsdp_plugin, accelerator.state.dynamo_plugin.backend
    if plugin.activation_checkpointing or compiler != DynamoBackend.NO:
        return False
    plugin.set_auto_wrap_policy(model)
    fsdp2_prepare_model(accelerator, model)
    return True


@contextmanager
def named_as_before_sharding(model: nn.Module) -> Iterator[None]:
    """Let the class that FSDP2 makes of a model's have its name and module while it is saved.

    `save_pretrained` copies the code of a model of its own module: of torch's, otherwise, and not the model's.
    """
    kind, names = type(model), ("__module__", "__name__", "__qualname__") if is_sharded(model) else ()
    asked = {name: getattr(kind, name) for name in names}
    try:
        for name in names:
            setattr(kind, name, getattr(kind.__bases__[-1], name))
        yield
    finally:
        for name, value in asked.items():
            setattr(kind, name, value)


@torch.no_grad()
def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, () float32; of shards that of what they are shards of, a collective.

    Sums of squares of each rank's part, then one number: torch's own norm of shards dispatches each through Python.
    """
    together: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        where = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())
        together[tensor.device, *where].append(local_part(tensor))
    squares = []
    for (_, mesh, places), parts in together.items():
        filled = [part for part in parts if part.numel()]  # a rank can hold nothing of some
        norms = torch._foreach_norm(filled, dtype=torch.float32) if filled else [parts[0].new_zeros(()).float()]
        square = torch.stack(norms).square().sum()
        for dim, place in enumerate(places):
            if not place.is_replicate():
                dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


# ---- the state of a run, by the names of weights alone: any engine on any number of ranks reads it ----


def shards_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Weights, and an optimizer's state, as `torch.distributed.checkpoint` takes them. A collective."""
    state: dict[str, Any] = {"model": _weights_of(model)}
    if optimizer is not None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return tree_map(_in_one_piece, state)


def _weights_of(model: nn.Module) -> dict[str, Any]:
    """All weights; under an adapter those that are trained."""
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=hasattr(model, "peft_config")))


def _in_one_piece(value: Any) -> Any:
    """A tensor of which ranks hold rows that follow one another: others, experts cut twice, are stored wrongly."""
    if not isinstance(value, DTensor) or not any(isinstance(place, _StridedShard) for place in value.placements):
        return value
    plain = [Shard(place.dim) if isinstance(place, _StridedShard) else place for place in value.placements]
    return value.redistribute(placements=plain)


def begin_to_save(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, group: dist.ProcessGroup
) -> Callable[[], Any]:
    """Copy every rank's part to the host's memory; what is returned writes it, in a thread if one likes.

    group: of gloo, used by nothing else meanwhile. Both are collectives.
    """
    state = tree_map(_copied_to_host, shards_of(model, optimizer))
    return partial(dcp.save, state, checkpoint_id=folder, process_group=group)


def _copied_to_host(value: Any) -> Any:
    # torch's own stager takes two tensors for one where a rank holds nothing of them ("invalid python storage", 2.13)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
    """Load weights, or with an optimizer its state alone, from what any number of ranks wrote. A collective."""
    state = shards_of(model, optimizer)
    state = {"model": state["model"]} if optimizer is None else {"optimizer": state["optimizer"]}
    dcp.load(state, checkpoint_id=folder)
    if optimizer is None:
        loaded, is_adapter = _dealt_like(state["model"], _weights_of(model)), hasattr(model, "peft_config")
        set_model_state_dict(model, loaded, options=StateDictOptions(strict=not is_adapter))
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        own = get_optimizer_state_dict(model, optimizer, options=options)
        loaded = _dealt_like(state["optimizer"], own)
        set_optimizer_state_dict(model, optimizer, loaded, options=options)


def _dealt_like(state: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Tensors of `state` with the placements of those of the same name in `own`."""

    def dealt(value: Any, like: Any) -> Any:
        differs = isinstance(value, DTensor) and value.placements != like.placements
        return value.redistribute(placements=like.placements) if differs else value

    return {name: dealt(value, own[name]) for name, value in state.items()}


def load_whole(
    model: nn.Module, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer | None, saved: dict[str, Any] | None
) -> None:
    """Deal whole weights, and the state that an optimizer of one process saved, to the ranks of a sharded model.

    saved: `state_dict()` of an optimizer whose state goes by the names of weights.
    """
    options = StateDictOptions(full_state_dict=True)
    if weights:
        set_model_state_dict(model, weights, options=options)
    if optimizer is not None and saved is not None:
        set_optimizer_state_dict(model, optimizer, saved, options=options)


def keep_own_gradients(model: nn.Module) -> int:
    """Let experts that no other rank has keep their gradients; returns how many modules. To be called once.

    FSDP2 puts gradients of a group together and takes them apart again, also in a group of one, for which the host
    needs 10 ms for 300 million numbers (torch 2.11, an H200): longer than the device for the layer.
    """
    reshard(model)
    found = 0
    for experts in model.modules():
        exchange, shards = getattr(experts, "_exchange", None), list(experts.parameters(recurse=False))
        if exchange is None or not isinstance(experts, FSDPModule) or not shards:
            continue
        mesh = shards[0].device_mesh
        if mesh.size() == (exchange.num_ranks if "ep" in mesh.mesh_dim_names else 1):
            experts.register_forward_pre_hook(partial(_listen_to_gradients, shards, exchange.num_ranks))
            found += 1
    return found


def _listen_to_gradients(shards: list[DTensor], num_batches: int, experts: nn.Module, _: Any) -> None:
    """After FSDP2 has put gathered weights, which live as long as the model, in the place of shards."""
    for gathered, shard in zip(experts.parameters(recurse=False), shards, strict=True):
        if gathered is not shard and gathered.requires_grad and not hasattr(gathered, "_hands_over"):
            gathered._hands_over = gathered.register_post_accumulate_grad_hook(partial(_hand_over, shard, num_batches))


def _hand_over(shard: DTensor, num_batches: int, gathered: Tensor) -> None:
    """The mean over batches, in the shard's type, as FSDP2 has it."""
    grad, gathered.grad = gathered.grad, None
    mine = local_part(grad).to(shard.dtype).div_(num_batches)
    if shard.grad is None:
        like = {"shape": shard.shape, "stride": shard.stride(), "run_check": False}
        shard.grad = DTensor.from_local(mine, shard.device_mesh, shard.placements, **like)
    else:
        shard.grad.to_local().add_(mine)


class ShardedModelCallback(TrainerCallback):
    """What a sharded model needs before its first step: parts gathered ahead, nothing exchanged twice.

    Parts are gathered while the one before runs. FSDP2 does that by itself in the backward pass; in the forward pass
    the host must be ahead of the device for it, which it is not where it waits for numbers of rows in every layer.
    """

    def __init__(self) -> None:
        self._telling: Any = None  # the handle of a hook
        self._is_measured = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """After the model was sharded and checkpointing switched on."""
        if model is None or not is_sharded(model):
            return
        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        for layer, following in zip(layers, layers[1:], strict=False):
            ahead = [part for part in following.modules() if isinstance(part, FSDPModule)]
            if isinstance(layer, FSDPModule) and ahead:
                layer.set_modules_to_forward_prefetch(ahead)
        overlap_shared_experts(model)
        keep_own_gradients(model)
        keep_gates(model)
        if any(hasattr(part, "_exchange") for part in model.modules()):
            agreement = RankAgreement(args.ddp_timeout_delta)
            if self._telling is not None:
                self._telling.remove()
            self._telling = tell_numbers_of_tokens(model, lambda own: int(agreement.of_all([own]).max()))
        exchanging = [layer for layer in layers if any(hasattr(part, "_exchange") for part in layer.modules())]
        for layer in exchanging:
            run = getattr(layer, "_gradient_checkpointing_func", None)
            is_reentrant = getattr(run, "keywords", {}).get("use_reentrant", True)
            if run is not None and layer.gradient_checkpointing and not is_reentrant:
                layer._gradient_checkpointing_func = partial(run, context_fn=keep_exchanges)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """After the first step, with which all memory has been taken: keep what there is room for. A collective."""
        if self._is_measured or model is None or not is_sharded(model) or args.device.type != "cuda":
            return
        self._is_measured = True
        free, total = torch.cuda.mem_get_info()
        room = free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated() - SPARE_MEMORY * total
        is_short = room < gathered_bytes(model, args.bf16 or args.fp16)
        if not RankAgreement(args.ddp_timeout_delta).of_all([float(is_short)]).any():
            keep_gathered(model)


def gathered_bytes(model: nn.Module, is_halved: bool) -> int:
    """Of the weights that `keep_gathered` keeps on this rank; is_halved: gathered in 16 bits, whatever their type."""
    shards = {weight for part in _gathering(model) for weight in part.parameters() if isinstance(weight, DTensor)}
    return sum(
        weight.to_local().numel() * _ranks_that_share(weight) * (2 if is_halved else weight.element_size())
        for weight in shards
    )


def keep_gathered(model: nn.Module) -> None:
    """Let weights that were gathered for the forward pass stay until the backward pass has used them."""
    for part in _gathering(model):
        part.set_reshard_after_forward(False, recurse=False)


def _gathering(model: nn.Module) -> list[FSDPModule]:
    """Parts whose weights come from other ranks: a gather of one rank is a copy, made again in no time."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    return [
        part
        for part in parts
        if any(_ranks_that_share(weight) > 1 for weight in part.parameters() if isinstance(weight, DTensor))
        and not hasattr(part, "_exchange")
    ]


def _ranks_that_share(weight: DTensor) -> int:
    """By FSDP2; experts that are dealt to ranks, and tensors that ranks share, stay where they are."""
    mesh, places = weight.device_mesh, weight.placements
    dims = zip(mesh.shape, places, mesh.mesh_dim_names or [""] * mesh.ndim, strict=True)
    return math.prod(size for size, place, name in dims if isinstance(place, Shard) and name not in ("ep", "tp"))


class RankAgreement:
    """Small exchanges over a gloo group of their own, on the CPU. To be made on all ranks at the same place.

    A question is asked at the end of a step and answered at the end of the next, so nobody waits; all ranks get the
    same answer at the same step.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.world_size = dist.get_world_size() if has_process_group() else 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self._asked: tuple[Tensor, Any] | None = None

    def any_of(self, flag: bool) -> bool:
        """Whether any rank had `flag` set at the call before; in one process, whether it is now. A collective."""
        if self._group is None:
            return flag
        answer = self._asked
        if answer is not None:
            answer[1].wait()
        asked = torch.tensor(int(flag))
        self._asked = asked, dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer is not None and bool(answer[0])

    def of_all(self, values: list[float]) -> Tensor:
        """(ranks, values): the values of every rank, in double precision, on the CPU. A collective."""
        own = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows)


@contextmanager
def repeatable_on_cpu(device: torch.device) -> Iterator[None]:
    """The same numbers in every run on the CPU, whatever the number of threads: torch's deterministic algorithms.

    The backward pass of the gather in front of grouped experts adds rows in the order in which threads come by, unless
    told otherwise; the switch costs nothing measurable. On CUDA it would ask for an environment variable of cuBLAS, so
    it stays as it is there (`full_determinism` of TrainingArguments is for that).
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=not was_on or only_warned)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
