"""One training step of a model whose experts are dealt to the ranks, beside that of the whole model. Source: ours."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers.tiny_models import VOCABULARY
from tests.helpers.tolerances import relative_rms_error


def batch() -> torch.Tensor:
    """Four rows of sixteen tokens."""
    return torch.randint(1, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))


def sharded_step(
    folder: Path,
    name: str,
    sizes: dict[str, Any],
    experts: str = "grouped_mm",
    bf16: bool = False,
) -> dict[str, Any]:
    """Largest error of logits and of any gradient, what each rank holds and does, and whether what is saved is equal.

    sizes: of a `DistributedConfig`. Ranks take their share of the rows, those of a tensor parallel group the same.
    """
    from transformers.distributed import DistributedConfig

    start, saved = folder / "model", folder / name.replace(" ", "_")
    rows = batch()
    tp_size = sizes.get("tp_size", 1)
    readers, reader = dist.get_world_size() // tp_size, dist.get_rank() // tp_size
    config = DistributedConfig(**sizes)
    cut = AutoModelForCausalLM.from_pretrained(start, distributed_config=config, experts_implementation=experts)
    whole = AutoModelForCausalLM.from_pretrained(start, experts_implementation=experts)
    got_logits, got = _step(cut, rows.chunk(readers)[reader], rows[:, 1:].numel(), bf16)
    want_logits, want = _step(whole, rows, rows[:, 1:].numel(), bf16)
    errors = {key: relative_rms_error(readers * got[key], want[key]) for key in want}  # the engine takes the mean
    errors["logits"] = relative_rms_error(got_logits, want_logits.chunk(readers)[reader])
    cut.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    first = whole.state_dict()
    mine = {"experts": _local_rows(cut), "errors": errors, "tokens": _tokens_of_rank(whole, rows, sizes["ep_size"])}
    mine["is_saved_whole"] = all(torch.equal(again[key], value) for key, value in first.items())
    ranks: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {"ranks": ranks}


def _step(model: PreTrainedModel, rows: torch.Tensor, num_items: int, bf16: bool) -> tuple[torch.Tensor, dict]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model.train()(input_ids=rows, labels=rows, num_items_in_batch=torch.tensor(num_items))
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out.logits.detach(), {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in gradients.items()}


def _local_rows(model: PreTrainedModel) -> int:
    return model.model.layers[0].mlp.experts.gate_up_proj.to_local().shape[0]


@torch.no_grad()
def _tokens_of_rank(model: PreTrainedModel, rows: torch.Tensor, ep_size: int) -> list[int]:
    """How many (token, expert) pairs of the first layer go to each part of the experts."""
    chosen = model(input_ids=rows, output_router_logits=True).router_indices[0]
    return torch.bincount(chosen.flatten() // -(-model.config.num_experts // ep_size), minlength=ep_size).tolist()
