"""Leaving the process group, which must really end, sums in the same order, and the precision in which FSDP2 sums."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer, TrainingArguments

from hf_moe_cpt.machine import has_process_group, leave_process_group
from hf_moe_cpt.trainers.common.distributed import (
    gathered_bytes,
    keep_gathered,
    named_as_before_sharding,
    ranks_of_a_row,
    reduce_in_float32,
)
from hf_moe_cpt.trainers.cpt import cpt_trainer
from hf_moe_cpt.trainers.cpt.cpt_data import optimizer_batch
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.tiny_models import tiny_model


def test_the_group_ends_with_the_wrappers_around_it(tmp_path):
    assert not has_process_group()
    leave_process_group()  # there is nothing to leave
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    wrapper(torch.ones(1, 2)).sum().backward()
    wrapper.cycle = [wrapper]
    seen = weakref.ref(wrapper)
    del wrapper
    assert has_process_group()
    leave_process_group()
    assert not has_process_group() and seen() is None


@pytest.mark.parametrize("runs", [cpt_runs, preference_runs, surgery_runs], ids=["cpt", "rainbowpo", "surgery"])
def test_threads_do_not_decide_a_gradient(runs, tmp_path):
    """On a CPU torch's deterministic algorithms make it; they are on in every backward pass and off afterwards."""
    run, seen = runs.trainer(tmp_path, max_steps=1), []
    weight = run.model.get_output_embeddings().weight
    weight.register_hook(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    run.train()
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()


class _Mean(nn.Module):
    """A model whose pass ends in a loss, as ours do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).float().mean() + 12.2488


def test_the_first_version_of_fsdp_is_refused():
    """Under it a norm was that of a rank's flat piece, and each rank clipped by its own."""
    with pytest.raises(ValueError, match="^FSDP version 1 is not supported: set fsdp_version: 2"):
        reduce_in_float32(FullyShardedDataParallelPlugin(fsdp_version=1))


def test_fsdp2_sums_in_float32_and_leaves_losses_unrounded(tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    plugin.set_mixed_precision("bf16")
    rounded = plugin.mixed_precision_policy
    reduce_in_float32(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        losses = {}
        for name, mp_policy in (("rounded", rounded), ("ours", policy)):
            torch.manual_seed(0)
            model = fully_shard(_Mean(), mesh=mesh, mp_policy=mp_policy)
            assert isinstance(model, FSDPModule)
            losses[name] = model(torch.ones(2, 8))
            losses[name].backward()
        assert losses["ours"].dtype == torch.float32 and losses["rounded"].dtype == torch.bfloat16
        assert abs(losses["ours"].item() - losses["rounded"].item()) > 1e-4
    finally:
        leave_process_group()


def test_a_policy_of_ones_own_and_full_precision_stay():
    own = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    own.mixed_precision_policy = chosen = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.float32)
    reduce_in_float32(own)
    assert own.mixed_precision_policy is chosen
    plain = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    reduce_in_float32(plain)
    assert plain.mixed_precision_policy is None
    reduce_in_float32(None)


def test_a_sharded_model_is_saved_with_its_own_code_as_a_whole_one_is(tmp_path):
    """transformers copies the files of the module of a model's class, and FSDP2 makes a class in torch's."""
    model = tiny_model("cpt_moe")
    model.save_pretrained(tmp_path / "whole")
    weights = dict(model.state_dict())
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model)
        kind = type(model).__name__
        with named_as_before_sharding(model):
            model.save_pretrained(tmp_path / "sharded", state_dict=weights)
        assert type(model).__name__ == kind
    finally:
        leave_process_group()
    whole, sharded = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "sharded")
    )
    assert whole == sharded


@pytest.mark.parametrize(
    "shape, names, shared", [((4,), None, 4), ((2, 2), ("dp_replicate", "fsdp"), 2), ((1,), None, 1)]
)
def test_gathered_weights_are_counted_and_kept(shape, names, shared):
    """Held against their number of bytes, and against the groups of FSDP2 that reshard after a forward pass."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(shape))
    try:
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        for part in (model[0], model[1], model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        whole = 8 * 16 + 16 + 16 * 4 + 4
        assert gathered_bytes(model, True) == (2 * whole if shared > 1 else 0)
        assert gathered_bytes(model, False) == (4 * whole if shared > 1 else 0)
        keep_gathered(model)
        kept = [part._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info is None for part in model]
        assert kept == [shared > 1] * 2
    finally:
        leave_process_group()


def test_ranks_that_share_tensors_are_one_in_every_count(tmp_path, monkeypatch):
    model = tiny_model("cpt_moe")
    model._tp_size = 2
    assert ranks_of_a_row(model, SimpleNamespace(parallelism_config=None)) == 2
    assert ranks_of_a_row(tiny_model("cpt_moe"), SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=4))) == 4
    monkeypatch.setattr(cpt_trainer, "ranks_of_a_row", lambda *_: 2)  # accelerate shares no tensors of CPU processes
    monkeypatch.setattr(Trainer, "get_tp_size", lambda _: 2)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 4))
    monkeypatch.setattr(torch.distributed, "barrier", lambda *_, **__: None)
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_steps": 1}
    run = cpt_runs.trainer(tmp_path, **batch, hang_timeout=0)
    assert (run.args.num_data_ranks, run.global_batch_size, optimizer_batch(run.args)) == (2, 30, 30)
    assert (run.token_count.copies, run._facts()["optimizer_batch"]) == (2, 30)
    assert run.mixture.law.count("new") + run.mixture.law.count("replay") == 30  # of the step that is asked for
