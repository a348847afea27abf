"""How much memory a GPU needs to train a model: weights, gradients, optimizer, activations, head, workspace.

Nothing is loaded. Parameters are counted on a model without weights, and what autograd keeps between the forward and
the backward pass on one under `FakeTensorMode`, where tensors have shapes, types and storages and no contents: a pass
of a model of any size then takes a second or so of one core, and torch itself says what every operation saves. Two
passes, over one sequence and over two, tell what grows with the batch from what does not:

    kept(B sequences) = fixed + B * sequence

`fixed` is above all copies of parameters, such as those that autocast makes; parameters themselves are not counted.
What a kernel allocates inside an operation is not seen, and attention is torch's CPU one, which like the fused GPU
kernels keeps queries, keys, values, output and a number per head and token. Fused kernels cannot run without memory:
stand-ins save the same tensors and compute nothing.

Two moments of a step are the fullest. When the backward pass begins everything kept for it is there, and the head's
own buffers; when it has ended all gradients are there, and little else:

    begin = weights + optimizer + reference + kept + max(head at work, its gradients + one layer's) + workspace
    end   = weights + optimizer + reference + gradients + one layer + workspace

`begin` holds gradients too where earlier passes of the same step left some. An estimate: allocators round up, and
memory in pieces is lost memory. Letters: T tokens of a pass, V vocabulary, H hidden size, K experts per token, I width
of an expert. Source: ours; the errors against measured peaks are in docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from hf_moe_cpt.routing.hooks import active_parameters


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a decoder keeps for its backward pass, final norm included and head excluded.

    fixed: whatever the batch: copies of parameters, padding. Of one sequence: outside: kept outside of layers; layers:
    kept by each; layer_input: what one layer is given. gathered: the same where weights are gathered in the computed
    type, and with them all that is kept; None where that is no difference.
    """

    fixed: int
    outside: int
    layers: tuple[int, ...]
    layer_input: int
    gathered: KeptBytes | None = None

    def of_batch(self, sequences: int, checkpointing: bool = False) -> int:
        """Bytes kept for so many sequences, without `fixed`.

        checkpointing: layers keep their input alone and are computed again one at a time, so the largest counts once.
        """
        if checkpointing:
            return sequences * (self.outside + len(self.layers) * self.layer_input + max(self.layers, default=0))
        return sequences * (self.outside + sum(self.layers))


@dataclass
class _Count:
    """One forward pass: bytes by place, -1 being outside of all layers."""

    bytes_of_place: dict[int, int] = field(default_factory=dict)
    layer_input: int = 0
    place: int = -1
    seen: set[int] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no storage's address is used twice

    def add(self, tensor: Tensor) -> Tensor:
        """Count the storage behind a tensor that an operation saves, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes_of_place[self.place] = self.bytes_of_place.get(self.place, 0) + storage.nbytes()
        self.alive.append(tensor)
        return tensor


def count_kept(
    build: Callable[[], nn.Module],
    layers_of: Callable[[nn.Module], Sequence[nn.Module]],
    sequence_length: int,
    autocast: torch.dtype | None = None,
) -> KeptBytes:
    """Count what the module that `build` makes keeps for its backward pass, on sequences of this many tokens.

    build: makes a decoder, called as `module(input_ids=ids, use_cache=False)`; it runs in fake mode, so it must not
    look at values. layers_of: its repeated layers in order, which attribution and checkpointing go by. autocast: the
    type of CPU autocast around the pass, or None. Raises ValueError if the sequence is empty.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1.")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build()
        one, two = (_count(module, layers_of(module), (batch, sequence_length), autocast) for batch in (1, 2))
    grown = {place: two.bytes_of_place[place] - size for place, size in one.bytes_of_place.items()}
    return KeptBytes(
        fixed=sum(one.bytes_of_place.values()) - sum(grown.values()),
        outside=grown.pop(-1, 0),
        layers=tuple(size for _, size in sorted(grown.items())),
        layer_input=one.layer_input,
    )


def _count(
    module: nn.Module, layers: Sequence[nn.Module], shape: tuple[int, int], autocast: torch.dtype | None
) -> _Count:
    count = _Count()
    states = [*module.parameters(), *module.buffers()]
    count.seen.update(state.untyped_storage()._cdata for state in states)
    handles = [handle for place, layer in enumerate(layers) for handle in _watch(layer, place, count)]
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    ids = torch.zeros(shape, dtype=torch.long)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor), mixed:
            module(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return count


def _watch(layer: nn.Module, place: int, count: _Count) -> list[torch.utils.hooks.RemovableHandle]:
    """Attribute what is saved while a layer runs to it."""

    def enter(_: nn.Module, given: tuple, named: dict) -> None:
        states = given[0] if given else named["hidden_states"]
        count.place, count.layer_input = place, max(count.layer_input, states.nbytes)

    def leave(*_: object) -> None:
        count.place = -1

    return [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]


ENGINES = ("single", "ddp", "fsdp2", "hsdp", "zero3", "ep")
TRAINERS = ("cpt", "rainbowpo", "surgery")
# plain: transformers as it is. experts: our experts in it. fused: those, Liger's norms and MLPs, our head.
KERNELS = ("plain", "experts", "fused")
PRECISIONS = {"mixed": 4, "bfloat16": 2}  # bytes of a weight; mixed computes in bfloat16 under autocast
COMPUTED = 2  # bytes of a number in products
# Copies of a weight that the optimizer holds, in the weights' type; the 8-bit one holds two of a byte each.
COPIES_OF_OPTIMIZER = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}
OPTIMIZERS = (*COPIES_OF_OPTIMIZER, "adamw_8bit")
LOGITS_BYTES = 512 * 2**20  # of a chunk of our fused head
TILE_OF_TRL = 4096 * 32768  # logits of a tile of TRL's fused head
CHUNK_OF_SURGERY = 512  # tokens
SUB_GROUP = 10**9  # parameters that ZeRO-3 steps at a time, with float32 gradients


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters by part. A head tied to the embedding counts once in `total`.

    layers: of each repeated layer. experts: routed experts of all layers. active: what a token is multiplied with, so
    without the embedding, with the head, and with the chosen experts only.
    """

    name: str
    total: int
    embedding: int
    head: int
    layers: tuple[int, ...]
    experts: int
    active: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    hidden_size: int
    attention_width: int  # heads x size of a head
    is_tied: bool


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    batch_size: of one GPU and pass, in sequences, pairs (rainbowpo) or rows of each term (surgery). terms: of a
    surgery. reference: "none", "copy", or "cache" (surgery: the head alone stays in memory).
    """

    engine: str = "single"
    gpus: int = 1
    gpus_per_node: int = 8
    batch_size: int = 8
    sequence_length: int = 2048
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "mixed"
    optimizer: str = "adamw"
    kernels: str = "fused"
    trainer: str = "cpt"
    reference: str = "none"
    terms: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("engine", ENGINES),
            ("trainer", TRAINERS),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("kernels", KERNELS),
            ("reference", ("none", "copy", "cache")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose from {', '.join(allowed)}.")
        for name in ("gpus", "gpus_per_node", "batch_size", "sequence_length", "accumulation", "terms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass on one GPU."""
        return self.batch_size * (2 if self.trainer == "rainbowpo" else 1)

    @property
    def passes(self) -> int:
        """Backward passes of an optimizer step."""
        return self.accumulation * (self.terms if self.trainer == "surgery" else 1)

    @property
    def ranks_of_node(self) -> int:
        """GPUs of a node that work on this."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest GPU at the fullest moment, by what they hold; `moment` is "begin" or "end"."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    workspace: int
    moment: str

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return sum(getattr(self, entry.name) for entry in fields(self) if entry.name != "moment")


def training_memory(size: ModelSize, kept: KeptBytes, setup: TrainingSetup) -> TrainingMemory:
    """What one GPU holds at the fuller of the two moments.

    kept: of the decoder, counted with the setup's precision, kernels and sequence length.
    """
    weight, held = PRECISIONS[setup.precision], parameters_held(size, setup)
    sharded = setup.engine in ("fsdp2", "hsdp", "zero3", "ep")
    weights, gradients, optimizer = _states(held, weight, setup)
    reference = {"none": 0, "cache": size.head * weight, "copy": held * weight}[setup.reference]
    workspace = workspace_at_end = _gathered(size, setup) if sharded else 0
    has_buckets = setup.engine == "ddp" and setup.gpus > 1  # that are reduced, and stay
    in_buckets = has_buckets and setup.trainer != "surgery"  # whose terms have gradients of their own
    if has_buckets:
        workspace, workspace_at_end = gradients, 0 if in_buckets else gradients
    if setup.engine == "zero3":
        workspace = workspace_at_end = workspace + min(held, SUB_GROUP) * 4
    elif sharded:  # without the embedding, and before there are gradients
        workspace = _gathered(size, setup, at_end=False)
    if sharded and kept.gathered is not None:
        kept = kept.gathered
    elif sharded and setup.precision == "mixed":  # gathered weights are in the computed type already: no copies
        copies = COMPUTED * (size.total - size.embedding - size.head)
        kept = replace(kept, fixed=kept.fixed - min(kept.fixed, copies))
    one_layer = setup.sequences * max(kept.layers, default=0)
    activations = kept.of_batch(setup.sequences, setup.checkpointing) + kept.fixed + _kept_of_others(size, setup)
    at_work, its_gradients = head_bytes(size, setup)
    head = max(at_work, its_gradients + one_layer)
    earlier = gradients if setup.passes > 1 and not in_buckets else 0
    begin = earlier + activations + head + workspace
    end = gradients + one_layer + workspace_at_end
    parts = {"weights": weights, "optimizer": optimizer, "reference": reference}
    if begin >= end:
        return TrainingMemory(
            **parts,
            gradients=earlier,
            activations=activations,
            head=min(head, at_work),
            workspace=workspace + head - min(head, at_work),
            moment="begin",
        )
    return TrainingMemory(
        **parts, gradients=gradients, activations=one_layer, head=0, workspace=workspace_at_end, moment="end"
    )


def parameters_held(size: ModelSize, setup: TrainingSetup) -> int:
    """Parameters that live on the fullest GPU between steps.

    FSDP2 cuts a tensor by its first dimension: experts go to ranks whole, 31 on 8 ranks as 4 on each but one, and on
    64 ranks one on each of 31. ZeRO-3 cuts anywhere. Expert parallelism pads, which comes to the same. Raises
    ValueError for expert parallelism without experts.
    """
    if setup.engine in ("single", "ddp"):
        return size.total
    if setup.engine == "zero3":
        return -(-size.total // setup.gpus)
    if setup.engine == "ep" and not size.num_experts:
        raise ValueError(f"engine='ep' spreads experts, and {size.name} has none: take 'fsdp2'.")
    ranks = setup.gpus if setup.engine in ("fsdp2", "ep") else setup.ranks_of_node
    ranks_of_experts = setup.ranks_of_node if setup.engine == "ep" else ranks
    of_one = size.experts // max(1, size.num_experts)
    return -(-(size.total - size.experts) // ranks) + of_one * -(-size.num_experts // ranks_of_experts)


def head_bytes(size: ModelSize, setup: TrainingSetup) -> tuple[int, int]:
    """Bytes of head and loss while they work, and of the gradients they leave for the layers' backward pass.

    Without a fused head: log-probabilities and two gradients of the logits in float32. Ours: both gradients and a
    chunk of logits. TRL's (rainbowpo): float32 gradients and a tile. Surgery: three chunks of logits in float32.
    """
    tokens, weight = setup.sequences * setup.sequence_length, PRECISIONS[setup.precision]
    states, matrix = tokens * size.hidden_size, size.head
    if setup.trainer == "rainbowpo":
        left = 4 * (states + matrix)
        return left + COMPUTED * min(TILE_OF_TRL, tokens * size.vocab_size), left
    if setup.trainer == "surgery":
        left = 4 * (states + matrix)
        chunks = 3 * 4 * min(CHUNK_OF_SURGERY, tokens) * size.vocab_size
        return left + chunks + (4 + COMPUTED) * matrix, left
    if setup.kernels != "fused":
        return 3 * 4 * tokens * size.vocab_size, weight * (states + matrix)
    is_gathered = setup.engine in ("fsdp2", "hsdp", "ep")  # in the computed type
    weight = COMPUTED if is_gathered else weight
    left = weight * (states + matrix)
    casts = COMPUTED * (states + matrix) if setup.precision == "mixed" and not is_gathered else 0
    return left + casts + min(LOGITS_BYTES, COMPUTED * tokens * size.vocab_size), left


def _states(held: int, weight: int, setup: TrainingSetup) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer."""
    state = 2 if setup.optimizer == "adamw_8bit" else weight * COPIES_OF_OPTIMIZER[setup.optimizer]
    if setup.engine == "zero3" and setup.precision == "mixed":
        return held * COMPUTED, held * COMPUTED, held * (weight + state)  # float32 weights are the optimizer's
    return held * weight, held * weight, held * state


def _gathered(size: ModelSize, setup: TrainingSetup, at_end: bool = True) -> int:
    """Whole weights of what is at work and of what comes next; at the end also their gradients, being reduced.

    Under expert parallelism FSDP2 copies a rank's experts where it gathers others' weights.
    """
    layer, exchanged = max(size.layers, default=0), 0
    copies = 4 if at_end else 2
    if setup.engine == "ep":
        experts = size.experts // max(1, len(size.layers))
        layer -= experts
        tokens = setup.sequences * setup.sequence_length
        exchanged = 2 * tokens * size.experts_per_token * size.hidden_size  # sent and received
        exchanged += 2 * experts // setup.ranks_of_node
    root = 2 * (size.embedding + (0 if size.is_tied else size.head)) if at_end else size.head
    return COMPUTED * (copies * layer + root + exchanged)


def kept_gathered(size: ModelSize, setup: TrainingSetup) -> int:
    """Bytes more when the backward pass begins, where a run keeps weights that were gathered for the forward pass.

    It does where 8 % of a GPU are left with them, and needs none of it: no part of `training_memory`.
    """
    if setup.engine not in ("fsdp2", "hsdp", "ep"):
        return 0
    of_experts = size.experts if setup.engine == "ep" else 0  # which are not gathered
    layer = max(size.layers, default=0) - of_experts // max(1, len(size.layers))
    return COMPUTED * max(0, size.total - of_experts - 2 * layer - size.head)


def _kept_of_others(size: ModelSize, setup: TrainingSetup) -> int:
    """Rows of other ranks' tokens that layers keep under expert parallelism, checkpointed or not.

    A token with K of the experts of N ranks travels to N (1 - (1 - 1/N)^K) of them where all are alike; to one it does
    without expert parallelism too. Where all tokens go everywhere, experts have room for the pairs of all ranks.
    """
    if setup.engine != "ep":
        return 0
    ranks, tokens, layers = setup.ranks_of_node, setup.sequences * setup.sequence_length, len(size.layers)
    spared = (1 - 1 / ranks) ** size.experts_per_token
    goes_everywhere = spared <= MOST_SPARED
    times = ranks * (1 if goes_everywhere else 1 - spared) - (0 if setup.checkpointing else 1)
    numbers = max(times, 0.0) * tokens * size.hidden_size * layers
    if goes_everywhere:
        width = 2 * size.experts / (3 * size.hidden_size * size.num_experts * layers)  # of gate and up of an expert
        pairs = (ranks - 1) * tokens * size.experts_per_token
        numbers += pairs * width * (1 if setup.checkpointing else layers)
    return int(COMPUTED * numbers)


MOST_SPARED = 0.2  # of `hf_moe_cpt.kernels.expert_parallel`
ATTENTION = "hf_moe_cpt_counted"
GROUPED_MM_EXPERTS, OUR_EXPERTS = "hf_moe_cpt_counted_grouped_mm", "hf_moe_cpt_counted_fused"
ROWS_PER_TILE = 128  # to which our kernels pad the rows of an expert at sizes that are worth planning


class _Saves(torch.autograd.Function):
    """Returns an empty tensor like the first, and saves the others."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("A stand-in for counting has no backward pass.")


def register_counted() -> None:
    """Make attention and experts for counting known to transformers, under names that nobody else uses."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    ExpertsInterface.register(GROUPED_MM_EXPERTS, _grouped_mm_experts)
    ExpertsInterface.register(OUR_EXPERTS, _our_experts)


def fuse_counted(model: nn.Module) -> None:
    """Let norms and gated MLPs save what Liger-Kernel's do: the input and a number per row; gate, up and product.

    Its rotation works in place, where ours makes new tensors in another order than attention returns.
    """
    for module in model.modules():
        if hasattr(module, "rotate_query_and_key"):
            module.rotate_query_and_key = _rotate_in_place
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        elif type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation", "GELUTanh") and all(
            isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")
        ):
            module.forward = types.MethodType(_gated_mlp, module)


def _attention(module: nn.Module, *states: Tensor, **options: Any) -> tuple[Tensor, None]:
    """torch's, causal without a mask, as on a GPU: a mask that is made only for fake tensors must not count."""
    query, key, value, *_ = states
    options["is_causal"] = True
    options.pop("softcap", None)  # a fused kernel caps in passing
    return sdpa_attention_forward(module, query, key, value, None, **options)


def _rotate_in_place(query: Tensor, key: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return query, key


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    per_row = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
    return _Saves.apply(hidden_states, hidden_states, self.weight, per_row)


def _gated_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    return self.down_proj(_Saves.apply(gate, gate, up))


def _widths(self: nn.Module) -> tuple[int, int, int]:
    """E experts, 2 I columns of gate and up, H."""
    experts, double_width, hidden = self.gate_up_proj.shape
    if getattr(self, "is_transposed", False):
        double_width, hidden = hidden, double_width
    return experts, double_width, hidden


def _grouped_mm_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' grouped_mm: rows in and out, gate and up, their activation and product, three orders of rows."""
    rows, (experts, double_width, hidden) = top_k_index.numel(), _widths(self)
    make = hidden_states.new_empty
    orders = [make(rows, dtype=torch.int64) for _ in range(3)]
    products = [make(rows, width) for width in (hidden, hidden, double_width, double_width // 2, double_width // 2)]
    counts = make(experts, dtype=torch.int32)
    gates = top_k_weights.new_empty(rows, 1)
    weights = (self.gate_up_proj, self.down_proj)
    return _Saves.apply(hidden_states, *weights, *orders, *products, counts, gates)


def _our_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ours: tokens, gates, gate and up before the activation, the routing table."""
    experts, double_width, _ = _widths(self)
    slots = top_k_index.numel()
    tiles = slots // ROWS_PER_TILE + min(experts, slots)
    make = hidden_states.new_empty
    table = [make(slots, dtype=torch.int32), make(tiles * ROWS_PER_TILE, dtype=torch.float32)]
    table += [make(tiles, dtype=torch.int32), make(tiles * ROWS_PER_TILE, double_width)]
    return _Saves.apply(hidden_states, hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, *table)


def measure_size(config: PreTrainedConfig, name: str) -> ModelSize:
    """Count parameters on a model without weights. Raises ValueError for what is no causal language model."""
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", 0):
        raise ValueError(f"{name} ({config.model_type}) has no attention heads: only models with them are planned.")
    with FakeTensorMode():
        model = _from_config(config, **_experts_option(config, "grouped_mm"))
    layers = layers_of(model)
    experts = [part for layer in layers for part in _expert_modules(layer)]
    experts_of = {part: part.gate_up_proj.shape[0] for part in experts}
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    in_embedding, in_head = _num_parameters(embedding), _num_parameters(head)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        name=name,
        total=model.num_parameters(),
        embedding=in_embedding,
        head=in_head,
        layers=tuple(_num_parameters(layer) for layer in layers),
        experts=sum(map(_num_parameters, experts)),
        active=active_parameters(model),
        num_experts=max(experts_of.values(), default=0),
        experts_per_token=chosen,
        vocab_size=head.weight.shape[0],
        hidden_size=text.hidden_size,
        attention_width=text.num_attention_heads * head_dim,
        is_tied=embedding.weight is head.weight,
    )


def measure_kept(config: PreTrainedConfig, sequence_length: int, precision: str, kernels: str) -> KeptBytes:
    """What the decoder keeps for the backward pass; of layers that are all alike two, and three, stand for all.

    precision: "mixed" (float32 weights under bfloat16 autocast) or "bfloat16". kernels: one of `KERNELS`.
    """
    if precision == "mixed":
        gathered = measure_kept(config, sequence_length, "bfloat16", kernels)
        return replace(_measure_kept(config, sequence_length, precision, kernels), gathered=gathered)
    return _measure_kept(config, sequence_length, precision, kernels)


def _measure_kept(config: PreTrainedConfig, sequence_length: int, precision: str, kernels: str) -> KeptBytes:
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if num_layers > 5 and _are_alike(config):
        two, three = (
            measure_all_kept(_with_layers(config, few), sequence_length, precision, kernels) for few in (2, 3)
        )
        if len({*two.layers, *three.layers}) == 1 and two.outside == three.outside:
            fixed = two.fixed + (num_layers - 2) * (three.fixed - two.fixed)
            return replace(two, layers=two.layers[:1] * num_layers, fixed=fixed)
    return measure_all_kept(config, sequence_length, precision, kernels)


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return short


def _are_alike(config: PreTrainedConfig) -> bool:
    """Whether all layers have the same kind and the same parameters."""
    with FakeTensorMode():
        layers = layers_of(_from_config(config, **_experts_option(config, "grouped_mm")))
    made_of = {(type(layer), *((name, weight.shape) for name, weight in layer.named_parameters())) for layer in layers}
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return len(layers) == config.get_text_config().num_hidden_layers and len(made_of) == 1 and len(set(kinds)) <= 1


def measure_all_kept(config: PreTrainedConfig, sequence_length: int, precision: str, kernels: str) -> KeptBytes:
    """`measure_kept` of every layer.

    precision: "mixed" (float32 weights under bfloat16 autocast) or "bfloat16". kernels: one of `KERNELS`.
    """
    register_counted()
    experts = GROUPED_MM_EXPERTS if kernels == "plain" else OUR_EXPERTS

    def build() -> nn.Module:
        dtype = torch.float32 if precision == "mixed" else torch.bfloat16
        model = _from_config(config, dtype=dtype, attn_implementation=ATTENTION, **_experts_option(config, experts))
        if kernels == "fused":
            fuse_counted(model)
        return model.base_model.train()

    try:
        return count_kept(build, layers_of, sequence_length, torch.bfloat16 if precision == "mixed" else None)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"What {config.model_type} keeps for its backward pass cannot be counted without running it "
            f"({type(error).__name__}: {reason}): measure a step of it instead."
        ) from error


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: what is checkpointed, and what FSDP gathers at a time."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)  # which writes options into it
    finally:
        logging.set_verbosity(before)


def _experts_option(config: PreTrainedConfig, name: str) -> dict[str, str]:
    """Dense models refuse the option."""
    text = config.get_text_config()
    has_experts = any(getattr(text, field, 0) for field in ("num_experts", "num_local_experts", "n_routed_experts"))
    return {"experts_implementation": name} if has_experts else {}


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _expert_modules(layer: nn.Module) -> list[nn.Module]:
    """Modules that hold the routed experts of a layer as parameters with experts in front."""
    return [
        module
        for module in layer.modules()
        if hasattr(module, "gate_up_proj")
        and hasattr(module, "down_proj")
        and isinstance(module.gate_up_proj, nn.Parameter)
        and module.gate_up_proj.ndim == 3
    ]
