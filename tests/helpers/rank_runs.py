"""The three trainers on any number of ranks, with the same global batch, by one program for one process or torchrun.

A job names an engine and how many micro-batches an optimizer step has; the rows of a rank follow from the number of
ranks, so that every step of every job sees the same rows. Run as a program, this file does all jobs of its argument
in turn and writes one JSON file: logs, and a checksum of the trained weights. Source: ours.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback

import hf_moe_cpt.modeling.modeling_cpt_moe  # noqa: F401  registers the model type with the Auto classes
from hf_moe_cpt.arguments import fsdp2_arguments
from hf_moe_cpt.machine import leave_process_group
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tolerances import relative_rms_error


ROWS = 16  # of each optimizer step: pairs, blocks, rows of a set
STEPS = 3
TRAINERS = ("cpt", "rainbowpo", "surgery")
ACCELERATE = PROJECT / "scripts" / "accelerate"
FSDP2 = fsdp2_arguments("CptMoeDecoderLayer")


def save_model(folder: Path, name: str = "model", **changes: Any) -> None:
    """The model that jobs start from, granular, with an output that is neither uniform nor certain."""
    model = tiny_model("cpt_moe", **{"num_experts": 31, **changes})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    model.save_pretrained(folder / name)
    preference_runs.word_tokenizer().save_pretrained(folder / name)


def open_model(path: Path, sharded: dict[str, Any] | None, **options: Any) -> PreTrainedModel:
    """A saved model, cut by transformers where sizes of a `DistributedConfig` are given."""
    if sharded:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**sharded)
    return AutoModelForCausalLM.from_pretrained(path, **options)


def build(kind: str, folder: Path, out: Path, rows: int, job: dict[str, Any]) -> Trainer:
    """A trainer of one kind whose ranks take `rows` rows in each micro-batch."""
    shared = {"max_steps": STEPS, "gradient_accumulation_steps": job.get("accumulation", 1), "learning_rate": 1e-2}
    # Adam's first steps are the signs of the gradients, which rounding decides where one is nearly 0: not with this.
    shared |= {"adam_epsilon": 1e-3, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    if job.get("recomputed"):
        shared["gradient_checkpointing"] = True
    if _has_fsdp(job):
        told = {} if job.get("on_gpu") else {"accelerator_config": {"use_configured_state": True}}
        shared |= told | (FSDP2 if job.get("fsdp") else {})
    sharded, options = job.get("sharded"), {}
    if job.get("on_gpu"):  # the kernels of a GPU under the policy of a GPU, without the minutes of a compiler
        shared |= {"use_cpu": False, "bf16": True, "kernels": "plain"}
        options = {"experts_implementation": "hf_moe_cpt"}
        sharded = sharded and {"fsdp_mixed_precision": True, **sharded}
    model = open_model(folder / job.get("model", "model"), sharded, **options)
    if job.get("short"):
        shared["bf16"] = True
    if job.get("rounded"):
        model.bfloat16().float()
    if not job.get("balance", True):  # it is no sum over micro-batches
        shared["router_balance"] = "none"
    if kind == "cpt":
        return cpt_runs.trainer(out, model, True, per_device_train_batch_size=rows, **shared)
    if kind == "rainbowpo":
        own = {"preset": "rainbowpo", "dispersion_scale": "auto", "data": preference_runs.pairs(STEPS * ROWS)}
        own |= {"eval_dataset": preference_runs.pairs(8, seed=1)}
        own |= {"output_dir": str(out), "per_device_train_batch_size": rows}
        return preference_runs.trainer(folder, model, **own, **shared)
    sizes = {f"{name}_batch_size": rows for name in surgery_runs.SETS}
    terms = {"log_term_gradients": True, "router_anchor": 0.5, "gradient_surgery": "project"}
    if job.get("shaken"):
        terms = {"forget_sharpness": 0.05, "weight_noise": 0.2, "expert_calibration": True, "router_projection": 0.5}
    return surgery_runs.trainer(out, model, **terms, **sizes, **shared)


def _has_fsdp(job: dict[str, Any]) -> bool:
    return "fsdp" in job or "accelerate" in job


@contextmanager
def clean_accelerate(job: dict[str, Any]) -> Iterator[None]:
    """One process is several runs here: each finds accelerate as a new process does, with its own environment.

    accelerate leaves FSDP out, without a word, where its processes have no GPU. Jobs with FSDP tell it that they have
    one; all that follows is accelerate's own, on gloo.
    """
    before = dict(os.environ)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    if "accelerate" in job:
        os.environ.update(launcher_environment(ACCELERATE / job["accelerate"]))
    if _has_fsdp(job) and not job.get("on_gpu"):
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state()
        PartialState._reset_state()


def launcher_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file config` tells the processes, in float32."""
    words = ["--config_file", str(config), "--mixed_precision", "no", "script.py"]
    before = dict(os.environ)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(args)
    os.environ.clear()  # the launcher writes into that of its own process too
    os.environ.update(before)
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}


def checksum(model: PreTrainedModel) -> float:
    """Root of the mean square of all weights, gathered: a number that a wrong step changes."""
    total, count = 0.0, 0
    for parameter in model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        total += whole.detach().double().square().sum().item()
        count += whole.numel()
    return (total / count) ** 0.5


class BetweenMicroBatches(TrainerCallback):
    """What gradients are while others of the same step are still to come: kinds of tensors, "none" for deferred."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def on_substep_end(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Between two micro-batches."""
        grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
        self.kinds |= {"none" if grad is None else type(grad).__name__ for grad in grads}


def run(kind: str, folder: Path, out: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Train and report: the log without clocks, the engine, the checksum, the scale of phi."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rows, rest = divmod(ROWS, ranks * job.get("accumulation", 1))
    if rest:
        raise ValueError(f"{ROWS} rows do not go into the micro-batches of {ranks} ranks evenly.")
    trainer = build(kind, folder, out, rows, job)
    between = BetweenMicroBatches()
    trainer.add_callback(between)
    trainer.train()
    found = {"log": cpt_runs.without_clocks(trainer.state.log_history), "weights": checksum(trainer.model)}
    found["engine"] = type(trainer.model_wrapped).__name__
    found["gradients_between"] = sorted(between.kinds)
    if kind == "rainbowpo":
        found["dispersion_scale"] = trainer.dispersion_scale
    return found


def sharded_step(
    folder: Path, name: str, sizes: dict[str, Any], experts: str = "grouped_mm", bf16: bool = False
) -> dict[str, Any]:
    """One training step of a model whose experts are dealt to the ranks, beside that of the whole model.

    Largest error of logits and of any gradient, what each rank holds and does, and whether what is saved is equal.

    sizes: of a `DistributedConfig`. Ranks take their share of the rows, those of a tensor parallel group the same.
    """
    from transformers.distributed import DistributedConfig

    start, saved = folder / "model", folder / name.replace(" ", "_")
    rows = torch.randint(1, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))
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


def run_jobs(folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by job, and by trainer where it trains."""
    results: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        if "step" in job:
            results[name] = sharded_step(folder, name, **job["step"])
            continue
        results[name] = {}
        for kind in ("surgery",) if job.get("shaken") or job.get("short") else TRAINERS:
            with clean_accelerate(job):
                results[name][kind] = run(kind, folder, folder / name / kind, job)
    return results


def main() -> None:
    """Do the jobs of the argument, JSON, and write what they found from the first rank."""
    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:  # else this is one process without a group
        backend = "gloo"
        if any(job.get("on_gpu") for job in asked["jobs"].values()):
            backend = "nccl"
            torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group(backend, timeout=timedelta(seconds=600))
    results: dict[str, dict[str, Any]] = {}
    for name, job in asked["jobs"].items():
        results |= run_jobs(folder, {name: job})
        if not dist.is_initialized() or dist.get_rank() == 0:
            written = folder / f"{asked['results']}.part"  # who finds the file finds all of it
            written.write_text(json.dumps(results))
    if not dist.is_initialized() or dist.get_rank() == 0:
        written.rename(folder / asked["results"])
    leave_process_group()


if __name__ == "__main__":
    main()
