"""Sparse upcycling: a dense Llama-like checkpoint becomes a mixture of experts, and a `cpt_moe` mixture a larger one.

Attention, norms, embeddings and head are carried over; every feed-forward block becomes a router and experts that are
copies or parts of it, scaled so that the model computes at step 0 what it computed before (docs/upcycle.md says when
exactly). Read and written shard by shard.

E routed experts, K per token, S shared, A = K + S active slots, H hidden size, I width of the dense block, m width of
an expert, G = I / m parts. A slot's part is its number modulo G; the shared experts are slots 0..S-1, the routed ones
that a token sees the rest. If A is a multiple of G, every part is seen A / G times, so each slot must count G / A for
the function to stay what it was. Routers of split blocks send a token to whole groups of experts: the rows of a group
are equal, so its members are chosen together. Every random number follows from the seed, the layer, the expert and the
matrix alone, so an upcycling can be repeated anywhere.

Sources: sparse upcycling, arXiv 2212.05055; groups and scales ("virtual groups"), arXiv 2410.07524; partial
re-initialisation (drop-upcycling), arXiv 2502.19261; experts of a mixture copied or split, arXiv 2604.19835; the cover
by shared experts, groups that do not divide E, and the scales for our routers: ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_moe_cpt.hub.checkpoint_io import (
    MAX_SHARD_SIZE,
    CheckpointReader,
    PlannedTensor,
    check_output,
    copied,
    leftovers,
    refuse_unused,
    scaled,
    skeleton,
)
from hf_moe_cpt.hub.convert import ATTENTION_FIELDS, empty_model, skeleton_fields, write_checkpoint
from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeMLP, CptMoeSparseMoeBlock
from hf_moe_cpt.reading import read_json, reading


ROUTER_INITS = ("noise", "zero")
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "cpt_moe")
TARGETS = {
    "granular": "pb-granular-2b",
    "switch": "pb-switch-2b",
    "sb-granular": "sb-granular-2b",
    "sb-switch": "sb-switch-2b",
}
MIXTURE_FIELDS = (
    "num_experts num_experts_per_tok num_shared_experts moe_intermediate_size router_type norm_topk_prob "
    "sinkhorn_iterations router_aux_loss_coef router_z_loss_coef output_router_logits load_scope"
).split()
RECORD_FILE = "upcycling.json"
_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
_SIZES += ["head_dim", "hidden_act", "norm_type", "tie_word_embeddings", *ATTENTION_FIELDS]


@dataclass(frozen=True)
class ExpertLayout:
    """num_parts: G. part_of_expert (E), shared_parts (S): numbers in 0..G-1. group_size: experts chosen together.

    routed_scale: factor on the gates, `routed_scaling_factor` of the configuration: weights of bfloat16 stay what they
    are. shared_scale: factor on the shared experts' output matrices, 1 where all slots together show each part once.
    gates_are_exact: whether the routed weights that the scales count on hold for every router, not only for one whose
    logits are 0.
    """

    num_parts: int
    part_of_expert: tuple[int, ...]
    shared_parts: tuple[int, ...]
    group_size: int
    routed_scale: float
    shared_scale: float
    gates_are_exact: bool

    @property
    def default_router_std(self) -> float:
        """Deviation of the first logits where none is asked for.

        Where gates are exact it costs nothing, and groups that lie far apart are still chosen whole after the first
        updates (docs/upcycle.md); where they are not, it is a price: parts pay some for their groups, copies little.
        """
        if self.gates_are_exact:
            return 1.0
        return 0.01 if self.group_size == 1 else 0.1


def plan_layout(config: CptMoeConfig, dense_width: int) -> ExpertLayout:
    """Divide a dense block of width I among the experts of a configuration.

    Raises ValueError if m does not divide I, if A is no multiple of G, or if E experts cannot be grouped.
    """
    E, K, S = config.num_experts, config.num_experts_per_tok, config.num_shared_experts
    width = config.moe_intermediate_size
    if dense_width % width:
        raise ValueError(
            f"moe_intermediate_size={width} does not divide the dense block's intermediate_size={dense_width}: "
            "choose a divisor."
        )
    num_parts = dense_width // width
    if (K + S) % num_parts:
        raise ValueError(
            f"moe_intermediate_size={width} makes {num_parts} parts of the dense block, which {K + S} active experts "
            f"(num_experts_per_tok={K} + num_shared_experts={S}) cannot cover evenly: choose a multiple of "
            f"{num_parts} active experts, or another width."
        )
    group_size = _group_size(E, K, num_parts)
    each = num_parts / (K + S)
    # The gate of a chosen expert when all router logits are 0.
    first_gate = 1 / K if config.norm_topk_prob else 0.5 if config.has_sigmoid_gates else 1 / E
    return ExpertLayout(
        num_parts=num_parts,
        part_of_expert=tuple((S + expert % group_size) % num_parts for expert in range(E)),
        shared_parts=tuple(slot % num_parts for slot in range(S)),
        group_size=group_size,
        routed_scale=each / first_gate,
        shared_scale=each,
        gates_are_exact=config.norm_topk_prob or (E == group_size and not config.has_sigmoid_gates),
    )


def router_rows(
    layout: ExpertLayout, hidden_size: int, router_init: str, logit_std: float, generator: torch.Generator
) -> torch.Tensor:
    """Router weights (E, H) in float64.

    "noise": normal, with logits of standard deviation logit_std for a token of root-mean-square 1; rows of a group are
    equal. Experts left over when the group size does not divide E get the mean of the rows: a mean is never the
    largest, so step 0 does not choose them. "zero": all 0. Raises ValueError for zeros that would leave it to chance
    which parts of a split block a token sees.
    """
    num_experts, size = len(layout.part_of_expert), layout.group_size
    if router_init == "zero":
        if size > 1 and num_experts > size:
            raise ValueError(
                f"router_init='zero' leaves it to chance which of the {layout.num_parts} parts of the dense block a "
                "token sees: use 'noise' for a split block."
            )
        return torch.zeros(num_experts, hidden_size, dtype=torch.float64)
    num_groups = num_experts // size
    rows = torch.randn(num_groups, hidden_size, generator=generator, dtype=torch.float64)
    rows *= logit_std / hidden_size**0.5
    left_over = rows.mean(dim=0).expand(num_experts - num_groups * size, -1)
    return torch.cat((rows.repeat_interleave(size, dim=0), left_over))


def _group_size(num_experts: int, top_k: int, num_parts: int) -> int:
    """Experts that must be chosen together: the parts in turn if K and E hold whole rounds of them, else all K."""
    if top_k % num_parts == 0 and num_experts % num_parts == 0:
        return num_parts
    if num_experts % top_k and num_experts < 2 * top_k:
        raise ValueError(
            f"num_experts={num_experts} is neither a multiple of num_experts_per_tok={top_k} nor at least "
            f"{2 * top_k}: the parts of a split block are chosen in groups of {top_k}; change one of the two."
        )
    return top_k


@dataclass(frozen=True)
class UpcycleOptions:
    """What may differ between experts at step 0; the defaults keep the dense model's function.

    router_init: "noise" or "zero"; router_std: of the logits of a token of root-mean-square 1, None for the layout's
    default. expert_noise: standard deviation, in [0, 1], of what is added to routed experts, as a multiple of the
    matrix's own. drop_ratio: share in [0, 1] of each routed expert's intermediate dimensions that is drawn anew.
    """

    router_init: str = "noise"
    router_std: float | None = None
    expert_noise: float = 0.0
    drop_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.router_init not in ROUTER_INITS:
            raise ValueError(f"router_init={self.router_init!r} is unknown: choose one of {', '.join(ROUTER_INITS)}.")
        if self.router_std is not None and not self.router_std > 0:
            raise ValueError(f"router_std={self.router_std} must be above 0; for none use router_init='zero'.")
        if not 0 <= self.expert_noise <= 1:
            raise ValueError(f"expert_noise={self.expert_noise} must lie in [0, 1]; 1 is as much as the weights.")
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must lie in [0, 1]; 0.5 is the paper's choice.")

    @property
    def changes_experts(self) -> bool:
        """Whether experts differ from the parts of the dense block."""
        return self.expert_noise > 0 or self.drop_ratio > 0


def generator_of(*words: object) -> torch.Generator:
    """A random generator that follows from the words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def gate_up_pieces(
    gate: torch.Tensor, up: torch.Tensor, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> Iterator[torch.Tensor]:
    """Dense gate and up (I, H) -> for each expert (1, 2m, H)."""
    for expert, part in enumerate(layout.part_of_expert):
        halves = (
            changed(rows_of(dense, part, layout), 0, name, options, layer, expert)
            for name, dense in (("gate", gate), ("up", up))
        )
        yield torch.cat(tuple(halves))[None]


def down_pieces(
    down: torch.Tensor, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> Iterator[torch.Tensor]:
    """Dense down (H, I) -> for each expert (1, H, m)."""
    for expert, part in enumerate(layout.part_of_expert):
        columns = rows_of(down.T, part, layout).T
        yield changed(columns, 1, "down", options, layer, expert)[None]


def rows_of(weight: torch.Tensor, part: int, layout: ExpertLayout) -> torch.Tensor:
    """Part `part` of a tensor's first dimension, I -> m."""
    return weight.chunk(layout.num_parts)[part]


def changed(
    weight: torch.Tensor, dimension: int, name: str, options: UpcycleOptions, layer: int, expert: int
) -> torch.Tensor:
    """One matrix of an expert with noise and with a share of its intermediate `dimension` drawn anew.

    The three matrices of an expert drop the same intermediate dimensions. What is drawn has the mean and the standard
    deviation of what it replaces.
    """
    if not options.changes_experts:
        return weight
    value = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    generator = generator_of(options.seed, "expert", layer, expert, name)
    if options.expert_noise > 0:
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        value += noise * (options.expert_noise * weight.to(value.dtype).std(correction=0))
    width = weight.shape[dimension]
    if num_dropped := round(options.drop_ratio * width):
        index = torch.randperm(width, generator=generator_of(options.seed, "drop", layer, expert))[:num_dropped]
        old = weight.to(value.dtype).index_select(dimension, index)
        fresh = torch.randn(old.shape, generator=generator, dtype=value.dtype)
        value.index_copy_(dimension, index, old.mean() + old.std(correction=0) * fresh)
    return value.to(weight.dtype)


@dataclass(frozen=True)
class Upcycled:
    """What was made. function: in words, how close to the dense model it is at step 0."""

    folder: Path
    config: CptMoeConfig
    layout: ExpertLayout
    num_parameters: int
    function: str
    leftovers: tuple[Path, ...]


def upcycle(
    dense: str | Path,
    output_dir: str | Path,
    to: str = "granular",
    options: UpcycleOptions | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
    **overrides: Any,
) -> Upcycled:
    """Make a mixture of experts out of a dense checkpoint, and write it into a new folder.

    dense: a folder or a Hub id, revision: of the latter. to: a key of `TARGETS`, or a JSON file (or folder with a
    config.json) that names `MIXTURE_FIELDS`; overrides: any of these fields. Raises ValueError, before
    anything is written, for families, sizes and files that do not allow it.
    """
    options = options or UpcycleOptions()
    reader = CheckpointReader(dense, revision)
    output = check_output(output_dir, reader.folder)
    with reading(f"a mixture of {str(dense)!r} and --to {to}", "mend the one that is wrong", keeps=(ValueError,)):
        config = target_config(reader, to, overrides)
        layout = plan_layout(config, config.intermediate_size)
        config.routed_scaling_factor = layout.routed_scale
        model = empty_model(config)
        plan = skeleton(reader, model)
        for layer in range(config.num_hidden_layers):
            plan += _feed_forward(reader, config, layout, options, layer)
        refuse_unused(reader, plan)
    function = function_in_words(config, layout, options)
    record = {"dense": reader.short_name, "dense_revision": reader.commit, "dense_family": reader.config.model_type}
    record |= {"to": to, "options": asdict(options), "layout": asdict(layout), "function_at_step_0": function}
    write_checkpoint(reader, plan, model, output, max_shard_size, {RECORD_FILE: json.dumps(record, indent=1) + "\n"})
    return Upcycled(output, config, layout, model.num_parameters(), function, tuple(leftovers(output)))


def grow(
    source: str | Path,
    output_dir: str | Path,
    split: int = 1,
    copies: int = 1,
    options: UpcycleOptions | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
) -> Upcycled:
    """Make a mixture with more experts out of a `cpt_moe` mixture, which computes the same at step 0.

    Each expert becomes `copies` times its `split` parts of width m / split, with equal router rows, so that a token
    that chose it chooses all of them: E and K grow by copies x split, the active width by copies. Copies differ by
    the noise of the options alone; router_init and router_std mean nothing here. Raises ValueError, before anything
    is written, for what does not divide, is no mixture of ours, or has another gate once K grows.
    """
    options = options or UpcycleOptions()
    reader = CheckpointReader(source, revision)
    output = check_output(output_dir, reader.folder)
    with reading(f"the mixture {str(source)!r}", keeps=(ValueError,)):
        config, layout = _grown(reader, split, copies)
        model = empty_model(config)
        plan = skeleton(reader, model)
        for layer in range(config.num_hidden_layers):
            plan += _grown_experts(reader, config, layout, options, layer)
        refuse_unused(reader, plan)
    function = "changed: experts were given noise or drawn anew in part"
    function = function if options.changes_experts else "the mixture's, up to rounding"
    record = {"source": reader.short_name, "source_revision": reader.commit, "split": split, "copies": copies}
    record |= {"options": asdict(options), "function_at_step_0": function}
    write_checkpoint(reader, plan, model, output, max_shard_size, {RECORD_FILE: json.dumps(record, indent=1) + "\n"})
    return Upcycled(output, config, layout, model.num_parameters(), function, tuple(leftovers(output)))


def _grown(reader: CheckpointReader, split: int, copies: int) -> tuple[CptMoeConfig, ExpertLayout]:
    """Configuration and layout of the larger mixture; part_of_expert: of the expert that it was made of."""
    old = reader.config
    if not (isinstance(old, CptMoeConfig) and old.is_moe):
        raise ValueError(f"{reader.name} is no mixture of cpt_moe: upcycle it, or convert it to cpt_moe first.")
    if split < 1 or copies < 1 or old.moe_intermediate_size % split:
        raise ValueError(
            f"split={split}, copies={copies}: both must be at least 1, and split must divide "
            f"moe_intermediate_size={old.moe_intermediate_size}."
        )
    if old.router_type == "sinkhorn" and old.num_experts_per_tok == 1:
        raise ValueError("router_type='sinkhorn' with num_experts_per_tok=1 has sigmoid gates, and with more none.")
    times, fields = split * copies, old.to_dict()
    fields |= {name: fields[name] * times for name in ("num_experts", "num_experts_per_tok")}
    fields["moe_intermediate_size"] //= split
    fields["num_shared_experts"] *= split
    # Gates that are divided among all chosen are 1 / times of what they were, plain sigmoids are as they were.
    factor = split if old.norm_topk_prob or not old.has_sigmoid_gates else 1 / copies
    fields["routed_scaling_factor"] *= factor
    config = CptMoeConfig(**{name: value for name, value in fields.items() if name != "model_type"})
    parts = tuple(expert % split for expert in range(config.num_experts))
    return config, ExpertLayout(split, parts, (), times, config.routed_scaling_factor, 1.0, gates_are_exact=True)


def _grown_experts(
    reader: CheckpointReader, config: CptMoeConfig, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> list[PlannedTensor]:
    """Router, routed and shared experts of a layer, made of those of a smaller mixture."""
    name, times, num_parts = f"model.layers.{layer}.mlp.", layout.group_size, layout.num_parts
    E, H, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    into, down = f"{name}experts.gate_up_proj", f"{name}experts.down_proj"
    dtype = reader.require(into, (E // times, 2 * width * num_parts, H))
    reader.require(down, (E // times, H, width * num_parts))

    def repeated(matrix: str) -> Iterator[torch.Tensor]:
        yield reader.tensor(matrix).repeat_interleave(times, dim=0)

    def pieces(matrix: str) -> Iterator[torch.Tensor]:
        for expert, part in enumerate(layout.part_of_expert):
            old = reader.row(matrix, expert // times)
            halves = {"gate": old.chunk(2)[0], "up": old.chunk(2)[1]} if matrix == into else {"down": old.T}
            new = [
                changed(rows_of(half, part, layout), 0, which, options, layer, expert)
                for which, half in halves.items()
            ]
            yield (torch.cat(new) if matrix == into else new[0].T)[None]

    plan = [
        PlannedTensor(into, (E, 2 * width, H), dtype, partial(pieces, into), (into,)),
        PlannedTensor(down, (E, H, width), dtype, partial(pieces, down), (down,)),
    ]
    routers = {f"{name}gate.weight": (H,)}
    routers |= {f"{name}gate.e_score_correction_bias": ()} if config.router_type == "bias_topk" else {}
    for matrix, rest in routers.items():
        kind = reader.require(matrix, (E // times, *rest))
        plan.append(PlannedTensor(matrix, (E, *rest), kind, partial(repeated, matrix), (matrix,)))
    shared = config.num_shared_experts * width
    for which, shape in (("gate", (shared, H)), ("up", (shared, H)), ("down", (H, shared))) if shared else ():
        plan.append(copied(reader, f"{name}shared_experts.{which}_proj.weight", shape))
    return plan


@torch.no_grad()
def first_block_error(dense: str | Path, made: Upcycled, revision: str | None = None) -> float:
    """Relative RMS difference of the first layer's feed-forward blocks, new and old, on 64 random tokens.

    As the weights were written, computed in float32 at least; holds one layer.
    """
    prefix = "model.layers.0.mlp."
    before, after = CheckpointReader(dense, revision), CheckpointReader(made.folder)
    was, config = copy.deepcopy(before.config), copy.deepcopy(made.config)
    was._experts_implementation = config._experts_implementation = "eager"  # others ask for widths of some multiple
    was_moe = isinstance(was, CptMoeConfig) and was.is_moe
    old = CptMoeSparseMoeBlock(was) if was_moe else CptMoeMLP(config, config.intermediate_size)
    blocks = (old.eval(), CptMoeSparseMoeBlock(config).eval())
    for reader, block in zip((before, after), blocks, strict=True):
        weights = {name.removeprefix(prefix): reader.tensor(name) for name in reader.shapes if name.startswith(prefix)}
        dtype = torch.promote_types(weights[next(iter(weights))].dtype, torch.float32)
        block.to(dtype).load_state_dict(weights, strict=False)  # without biases that are zero
    tokens = torch.randn(1, 64, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    want, got = (block(tokens) for block in blocks)
    return float((got - want).norm() / want.norm())


def target_config(reader: CheckpointReader, to: str, overrides: dict[str, Any]) -> CptMoeConfig:
    """The skeleton of the dense model with the mixture that `to` and the overrides name."""
    dense = reader.config
    if dense.model_type not in DENSE_FAMILIES or getattr(dense, "num_experts", 0):
        kind = "a mixture already" if dense.model_type == "cpt_moe" else f"of type {dense.model_type!r}"
        raise ValueError(
            f"{reader.name} is {kind}: dense models of {', '.join(DENSE_FAMILIES)} can be upcycled, and mixtures of "
            "cpt_moe grow by --split and --copies."
        )
    fields = skeleton_fields(dense) | {"intermediate_size": dense.intermediate_size}
    named = mixture_named(to)
    if to in TARGETS:  # not the paper's raw gates, with which parts of the dense blocks mix from the first steps on
        named["norm_topk_prob"] = overrides.get("num_experts_per_tok", named["num_experts_per_tok"]) > 1
    for name in _SIZES:
        if name in named and named[name] is not None and named[name] != fields.get(name, "rmsnorm"):
            raise ValueError(
                f"--to {to} says {name}={named[name]!r}, the dense model has {fields.get(name, 'rmsnorm')!r}: "
                "upcycling keeps it; leave it out."
            )
    mixture = {name: named[name] for name in MIXTURE_FIELDS if name in named} | overrides
    if unknown := sorted(set(overrides) - set(MIXTURE_FIELDS)):
        raise ValueError(f"{', '.join(unknown)} is no field of a mixture: choose from {', '.join(MIXTURE_FIELDS)}.")
    if not mixture.get("num_experts"):
        raise ValueError(f"--to {to} names no experts: set num_experts.")
    return CptMoeConfig(**fields, **mixture)


def mixture_named(to: str) -> dict[str, Any]:
    """The fields that a target means. Raises ValueError if it is neither a known name nor a readable file."""
    if to in TARGETS:
        return {name: value for name, value in PRESETS[TARGETS[to]].items() if name in MIXTURE_FIELDS}
    path = Path(to) / "config.json" if Path(to).is_dir() else Path(to)
    if not path.is_file():
        raise ValueError(f"--to {to!r} is unknown: choose {', '.join(TARGETS)}, or name a JSON file.")
    named = read_json(path)
    if unknown := sorted(set(named) - set(CptMoeConfig().to_dict())):
        raise ValueError(f"--to {to!r} sets {', '.join(unknown)}, no field of CptMoeConfig: check the spelling.")
    return named


def function_in_words(config: CptMoeConfig, layout: ExpertLayout, options: UpcycleOptions) -> str:
    """How the function at step 0, in evaluation, relates to the dense model's."""
    if options.changes_experts:
        return "changed: experts were given noise or drawn anew in part"
    if layout.gates_are_exact or options.router_init == "zero":
        return "the dense model's, up to rounding"
    return (
        "close to the dense model's: gates are not normalised and follow the router's logits, "
        f"of standard deviation {options.router_std or layout.default_router_std}"
    )


def _feed_forward(
    reader: CheckpointReader, config: CptMoeConfig, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> list[PlannedTensor]:
    """Router, routed and shared experts of a layer, made of its dense block."""
    name = f"model.layers.{layer}.mlp."
    H, width, dense_width = config.hidden_size, config.moe_intermediate_size, config.intermediate_size
    E, S = config.num_experts, config.num_shared_experts
    gate, up, down = (f"{name}{which}_proj.weight" for which in ("gate", "up", "down"))
    for matrix, shape in ((gate, (dense_width, H)), (up, (dense_width, H)), (down, (H, dense_width))):
        dtype = reader.require(matrix, shape)
    router_generator = generator_of(options.seed, "router", layer)
    std = options.router_std or layout.default_router_std
    rows = router_rows(layout, H, options.router_init, std, router_generator).to(dtype)

    def experts_in() -> Iterator[torch.Tensor]:
        return gate_up_pieces(reader.tensor(gate), reader.tensor(up), layout, options, layer)

    def experts_out() -> Iterator[torch.Tensor]:
        return down_pieces(reader.tensor(down), layout, options, layer)

    def shared(matrix: str) -> Iterator[torch.Tensor]:
        weight = reader.tensor(matrix)
        if matrix == down:
            parts = [rows_of(weight.T, part, layout).T for part in layout.shared_parts]
            yield scaled(torch.cat(parts, dim=1), layout.shared_scale)
        else:
            yield from (rows_of(weight, part, layout) for part in layout.shared_parts)

    plan = [
        PlannedTensor(f"{name}gate.weight", (E, H), dtype, lambda: iter([rows])),
        PlannedTensor(f"{name}experts.gate_up_proj", (E, 2 * width, H), dtype, experts_in, (gate, up)),
        PlannedTensor(f"{name}experts.down_proj", (E, H, width), dtype, experts_out, (down,)),
    ]
    shapes = {gate: (S * width, H), up: (S * width, H), down: (H, S * width)}
    for matrix, shape in shapes.items() if S else ():
        shared_name = matrix.replace(".mlp.", ".mlp.shared_experts.")
        plan.append(PlannedTensor(shared_name, shape, dtype, partial(shared, matrix), (matrix,)))
    return plan
