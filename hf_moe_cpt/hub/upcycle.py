"""Sparse upcycling: a dense Llama-like checkpoint becomes a mixture of experts of the family `cpt_moe`.

Attention, norms, embeddings and head are carried over; every feed-forward block becomes a router and experts that are
copies or parts of it, scaled so that the model computes at step 0 what it computed before. Read and written shard by
shard. Letters and sources: `upcycle_layout`; docs/upcycle.md says when the function is kept exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_moe_cpt.hub.convert_attention import ATTENTION_FIELDS
from hf_moe_cpt.hub.convert_skeleton import empty_model, skeleton_fields, write_config
from hf_moe_cpt.hub.streaming_output import (
    MAX_SHARD_SIZE,
    appearing_whole,
    check_disk_space,
    check_output,
    copy_companions,
    leftovers,
    write_weights,
)
from hf_moe_cpt.hub.streaming_plan import PlannedTensor, refuse_unused, scaled, skeleton
from hf_moe_cpt.hub.streaming_source import CheckpointReader
from hf_moe_cpt.hub.upcycle_layout import ExpertLayout, plan_layout, router_rows
from hf_moe_cpt.hub.upcycle_weights import UpcycleOptions, down_pieces, gate_up_pieces, generator_of, rows_of
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.presets_cpt_moe import PRESETS


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
    config = target_config(reader, to, overrides)
    layout = plan_layout(config, config.intermediate_size)
    model = empty_model(config)
    plan = skeleton(reader, model)
    for layer in range(config.num_hidden_layers):
        plan += _feed_forward(reader, config, layout, options, layer)
    refuse_unused(reader, plan)
    check_disk_space(output, sum(tensor.num_bytes for tensor in plan))
    function = function_in_words(config, layout, options)
    with appearing_whole(output) as folder:
        write_weights(folder, plan, max_shard_size)
        copy_companions(reader.folder, folder)
        write_config(model, folder)
        record = {"dense": reader.short_name, "dense_revision": reader.commit}
        record |= {"dense_family": reader.config.model_type, "to": to}
        record |= {"options": asdict(options), "layout": asdict(layout), "function_at_step_0": function}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Upcycled(output, config, layout, model.num_parameters(), function, tuple(leftovers(output)))


def target_config(reader: CheckpointReader, to: str, overrides: dict[str, Any]) -> CptMoeConfig:
    """The skeleton of the dense model with the mixture that `to` and the overrides name."""
    dense = reader.config
    if dense.model_type not in DENSE_FAMILIES or getattr(dense, "num_experts", 0):
        kind = "a mixture already" if dense.model_type == "cpt_moe" else f"of type {dense.model_type!r}"
        raise ValueError(f"{reader.name} is {kind}: dense models of {', '.join(DENSE_FAMILIES)} can be upcycled.")
    fields = skeleton_fields(dense) | {"intermediate_size": dense.intermediate_size}
    named = mixture_named(to)
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
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--to {to!r} is no JSON: {error}.") from error
    if not isinstance(named, dict):
        raise ValueError(f"--to {to!r} must hold one JSON object of fields, got {type(named).__name__}.")
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
