"""What a plan knows of a model: parameters against loaded ones, kept tensors against a pass with contents."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, PreTrainedConfig

from hf_moe_cpt.analysis.training_memory import TrainingSetup, parameters_held
from hf_moe_cpt.scripts.bench_step_models import config_of
from hf_moe_cpt.scripts.plan_counted import EXPERTS_OF, register_counted
from hf_moe_cpt.scripts.plan_model import layers_of, measure_kept, measure_size, read_config


LENGTH = 96
GPT2 = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def really_kept(config: PreTrainedConfig, dtype: torch.dtype, experts: dict[str, str]) -> int:
    """Bytes of all storages that a real pass over one sequence saves, parameters aside."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **experts).train()
    states = [*model.parameters(), *model.buffers()]
    size_of, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        size_of[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(size for key, size in size_of.items() if key not in {s.untyped_storage()._cdata for s in states})


@pytest.mark.parametrize(
    "name", ["llama-tiny", "dense-tiny", "pb-granular-tiny", "sb-switch-tiny", "qwen2-moe-granular-tiny"]
)
def test_counted_is_what_a_real_pass_keeps(name: str) -> None:
    """Without copies of weights, so in one type; masks and positions that do not grow with the batch are 1 % or so."""
    config = config_of(name)
    experts = (
        {} if "moe" not in name and "pb" not in name and "sb" not in name else {"experts_implementation": "grouped_mm"}
    )
    counted = measure_kept(config, LENGTH, "bfloat16", "plain")
    assert len(counted.layers) == config.num_hidden_layers
    kept = really_kept(config, torch.bfloat16, experts)
    assert counted.of_batch(1) + counted.fixed == pytest.approx(kept, rel=0.002)


def test_stand_in_of_our_experts_saves_what_the_real_ones_save() -> None:
    """The real operator knows its shapes without a GPU: what it saves is compared with what the stand-in saves."""
    pytest.importorskip("triton")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from hf_moe_cpt.kernels.experts_layer import experts

    register_counted()
    holder = nn.Module()

    def saved(call: object) -> int:
        size_of, alive = {}, []

        def keep(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            size_of[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with FakeTensorMode():
            holder.gate_up_proj = nn.Parameter(torch.empty(31, 2 * 64, 128, dtype=torch.bfloat16))
            holder.down_proj = nn.Parameter(torch.empty(31, 128, 64, dtype=torch.bfloat16))
            tokens = torch.empty(4096, 128, dtype=torch.bfloat16, requires_grad=True)
            index, gates = torch.zeros(4096, 3, dtype=torch.long), torch.empty(4096, 3, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                call(tokens, index, gates)
        return sum(size_of.values())

    def real(tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        return experts(tokens, index, gates, holder.gate_up_proj, holder.down_proj, "silu")

    def stand_in(tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        return ALL_EXPERTS_FUNCTIONS[EXPERTS_OF["hf_moe_cpt"]](holder, tokens, index, gates)

    assert saved(stand_in) == pytest.approx(saved(real), rel=0.001)


@pytest.mark.parametrize(
    "config", [config_of("pb-granular-tiny"), config_of("llama-tiny"), GPT2], ids=["ours", "llama", "gpt2"]
)
def test_parameters_are_those_of_the_model(config: PreTrainedConfig) -> None:
    size, model = measure_size(config, "it"), AutoModelForCausalLM.from_config(config)
    assert size.total == model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert size.is_tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert len(size.layers) == len(layers_of(model)) == config.num_hidden_layers
    routed = [weight.numel() for name, weight in model.named_parameters() if "mlp.experts." in name]
    assert size.experts == sum(routed)
    unchosen = sum(routed) * (1 - 3 / 31)
    embedding = model.get_input_embeddings().weight.numel() * (not size.is_tied)
    assert size.active == pytest.approx(size.total - unchosen - embedding)


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("name", ["pb-granular-tiny", "llama-tiny"])
def test_fsdp_leaves_on_a_rank_what_is_planned(name: str, gpus: int) -> None:
    """FSDP2 itself, in a process group that only pretends; rows that do not divide are 2 % of tiny matrices."""
    model = AutoModelForCausalLM.from_config(config_of(name))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        for part in (*layers_of(model), model):
            fully_shard(part, mesh=mesh)
        held = sum(weight.to_local().numel() for weight in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    planned = parameters_held(measure_size(config_of(name), name), TrainingSetup(engine="fsdp2", gpus=gpus))
    assert planned == pytest.approx(held, rel=0.02)


def test_mixed_precision_adds_copies_of_weights_and_wider_norms() -> None:
    config = config_of("pb-switch-tiny")
    mixed, lean = (measure_kept(config, LENGTH, precision, "fused") for precision in ("mixed", "bfloat16"))
    plain = measure_kept(config, LENGTH, "mixed", "plain")
    size = measure_size(config, "it")
    matrices = size.total - size.embedding - size.head
    assert plain.fixed == pytest.approx(2 * matrices, rel=0.02)
    assert mixed.of_batch(1) > lean.of_batch(1)
    assert lean.of_batch(1) < measure_kept(config, LENGTH, "bfloat16", "plain").of_batch(1)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--preset 'pb-granular-3b' is unknown: choose from dense-570m, "):
        read_config("pb-granular-3b", None)
    with pytest.raises(ValueError, match=r"is a folder without config\.json: give one that a model was saved in\.$"):
        read_config(None, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody knows"}')
    with pytest.raises(ValueError, match=r"has no configuration that can be read: "):
        read_config(None, str(tmp_path))
    with pytest.raises(ValueError, match=r"^m \(mamba\) has no attention heads: only models with them are planned\.$"):
        measure_size(MambaConfig(), "m")
    config_of("pb-granular-tiny").save_pretrained(tmp_path)
    assert read_config(None, str(tmp_path)).num_experts == 31
