"""Saved activations against what operations are known to save and what a pass with contents keeps, memory arithmetic
against a real optimizer, division and FSDP2, parameters against loaded models. S tokens, H states, W width.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, PreTrainedConfig, Qwen3MoeConfig

from hf_moe_cpt.kernels import expert_parallel
from hf_moe_cpt.planning import memory as planning
from hf_moe_cpt.planning.plan import config_of, read_config


S, H, W = 6, 8, 20


class Block(nn.Module):
    """A layer whose products and activation save tensors that can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, W, bias=False), nn.Linear(W, H, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(states)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, H), nn.ModuleList([Block(), Block(), Block()])
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return states * self.scale


def test_a_sequence_of_known_operations() -> None:
    """Each layer: input, width before and after the activation. Outside: ids of the embedding, input of the scale."""
    kept = planning.count_kept(Decoder, lambda decoder: list(decoder.layers), S)
    assert kept.layers == (4 * S * (H + 2 * W),) * 3
    assert kept.outside == 8 * S + 4 * S * H
    assert kept.layer_input == 4 * S * H
    assert kept.fixed == 0
    assert kept.of_batch(5) == 5 * (kept.outside + 3 * kept.layers[0])
    assert kept.of_batch(5, checkpointing=True) == 5 * (kept.outside + 3 * kept.layer_input + kept.layers[0])
    kept = planning.KeptBytes(fixed=7, outside=1, layers=(10, 30, 20), layer_input=2)
    assert kept.of_batch(2) == 2 * 61
    assert kept.of_batch(2, checkpointing=True) == 2 * (1 + 3 * 2 + 30)
    with pytest.raises(ValueError, match=r"^sequence_length=0 must be at least 1\.$"):
        planning.count_kept(Decoder, lambda decoder: list(decoder.layers), 0)


def test_autocast_keeps_a_copy_of_every_matrix_whatever_the_batch() -> None:
    """First products save bfloat16 copies of the embedding's float32 output; later states are bfloat16 themselves."""
    kept = planning.count_kept(Decoder, lambda decoder: list(decoder.layers), S, torch.bfloat16)
    assert kept.fixed == 2 * 6 * H * W
    assert kept.layers == (2 * S * (H + 2 * W),) * 3
    assert kept.layer_input == 4 * S * H  # the first is the widest


SIZE = planning.ModelSize(
    name="a model",
    total=10_000,
    embedding=500,
    head=500,
    layers=(3_000, 3_000, 3_000),
    experts=6_200,
    active=2_000,
    num_experts=31,
    experts_per_token=3,
    vocab_size=50,
    hidden_size=10,
    attention_width=10,
    is_tied=False,
)
KEPT = planning.KeptBytes(fixed=100, outside=1_000, layers=(40_000, 40_000, 40_000), layer_input=500)
DTYPES = {"mixed": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda weights: torch.optim.SGD(weights, momentum=0.9),
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_those_of_a_real_step(optimizer: str, precision: str) -> None:
    """Weights, gradients and optimizer states after a step, to the byte; Adam's step counts are left out."""
    model = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 8, bias=False)).to(DTYPES[precision])
    stepper = OPTIMIZERS[optimizer](model.parameters())
    model(torch.ones(2, 16, dtype=DTYPES[precision])).float().sum().backward()
    stepper.step()
    weights = list(model.parameters())
    states = [state for of_weight in stepper.state.values() for state in of_weight.values() if state is not None]
    size = replace(SIZE, total=sum(weight.numel() for weight in weights))
    setup = planning.TrainingSetup(precision=precision, optimizer=optimizer, accumulation=2)
    memory = planning.training_memory(size, KEPT, setup)
    assert memory.weights == sum(weight.nbytes for weight in weights)
    assert memory.gradients == sum(weight.grad.nbytes for weight in weights)
    assert memory.optimizer == sum(state.nbytes for state in states if state.ndim)


def test_sharding_divides_states_and_leaves_experts_whole() -> None:
    def held(engine: str, gpus: int, gpus_per_node: int = 8) -> int:
        return planning.parameters_held(
            SIZE, planning.TrainingSetup(engine=engine, gpus=gpus, gpus_per_node=gpus_per_node)
        )

    assert held("ddp", 8) == SIZE.total
    assert held("zero3", 16) == SIZE.total / 16
    assert (
        held("fsdp2", 8) == held("hsdp", 16) == held("ep", 8) == 3_800 / 8 + 4 * 200
    )  # 31 experts, 8 ranks: 4 on each
    assert held("ep", 16) == 238 + 4 * 200  # 3,800 / 16, rounded up; the other node holds the same experts
    assert held("fsdp2", 64) == 60 + 200  # 31 ranks have an expert
    assert held("ep", 2, gpus_per_node=2) == 3_800 / 2 + 16 * 200
    with pytest.raises(ValueError, match=r"^engine='ep' spreads experts, and a model has none: take 'fsdp2'\.$"):
        planning.parameters_held(replace(SIZE, num_experts=0, experts=0), planning.TrainingSetup(engine="ep", gpus=2))


def test_total_is_the_sum_at_the_fuller_moment() -> None:
    setup = planning.TrainingSetup(batch_size=1, sequence_length=4, kernels="fused")
    begin = planning.training_memory(SIZE, KEPT, setup)
    assert (begin.moment, begin.gradients) == ("begin", 0)
    assert begin.activations == KEPT.of_batch(1) + KEPT.fixed
    end = planning.training_memory(SIZE, replace(KEPT, layers=(10, 10, 10)), setup)
    assert (end.moment, end.gradients, end.head) == ("end", 4 * SIZE.total, 0)
    for memory in (begin, end):
        parts = ("weights", "gradients", "optimizer", "reference", "activations", "head", "workspace")
        assert memory.total == sum(getattr(memory, part) for part in parts)


def test_what_adds_to_memory_and_what_takes_off() -> None:
    setup = planning.TrainingSetup(batch_size=2, sequence_length=4)

    def total(**changes: object) -> int:
        return planning.training_memory(SIZE, KEPT, replace(setup, **changes)).total

    alone = total()
    assert total(accumulation=2) == alone + 4 * SIZE.total
    assert total(trainer="surgery", terms=2, reference="copy") > total(trainer="surgery", terms=2, reference="cache")
    assert total(trainer="surgery", terms=2) == total(trainer="surgery", terms=5)  # one term after the other
    assert total(engine="ddp", gpus=2) == alone + 4 * SIZE.total
    assert total(engine="ddp", gpus=1) == alone
    assert planning.MOST_SPARED == expert_parallel.MOST_SPARED  # up to which all tokens go to all ranks
    assert total(checkpointing=True) == alone - 2 * (3 - 1) * 40_000 + 2 * 3 * 500
    assert total(trainer="rainbowpo", reference="copy") == total(trainer="rainbowpo") + 4 * SIZE.total
    assert total(optimizer="adamw_8bit") == alone - 6 * SIZE.total
    setup = planning.TrainingSetup(batch_size=2, sequence_length=4, kernels="plain")
    assert planning.head_bytes(SIZE, setup)[0] == 3 * 4 * (2 * 4) * SIZE.vocab_size
    fused = planning.head_bytes(replace(SIZE, vocab_size=10**6), replace(setup, kernels="fused", sequence_length=4096))
    assert fused[0] - fused[1] < 513 * 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tp"}, r"^engine='tp' is unknown: choose from single, ddp, fsdp2, hsdp, zero3, ep\.$"),
        ({"optimizer": "lamb"}, r"^optimizer='lamb' is unknown: choose from adamw, sgd_momentum, sgd, adamw_8bit\.$"),
        ({"gpus": 0}, r"^gpus=0 must be at least 1\.$"),
    ],
)
def test_a_bad_setup_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planning.TrainingSetup(**changes)


LENGTH = 96
GPT2 = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def saved_storages(run: Callable[[], object]) -> dict[int, int]:
    """Bytes of each storage that a pass saves for its backward pass, by its address."""
    size_of, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        size_of[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return size_of


def really_kept(config: PreTrainedConfig, dtype: torch.dtype, experts: dict[str, str]) -> int:
    """Bytes of all storages that a real pass over one sequence saves, parameters aside."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **experts).train()
    states = {state.untyped_storage()._cdata for state in (*model.parameters(), *model.buffers())}
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    saved = saved_storages(lambda: model.base_model(input_ids=ids, use_cache=False))
    return sum(size for key, size in saved.items() if key not in states)


@pytest.mark.parametrize(
    "name",
    [
        "llama-tiny",
        "pb-granular-tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sb-switch-tiny", "qwen2-moe-granular-tiny")),
    ],
)
def test_counted_is_what_a_real_pass_keeps(name: str) -> None:
    """Without copies of weights, so in one type; masks and positions that do not grow with the batch are 1 % or so."""
    config = config_of(name)
    experts = {} if name == "llama-tiny" else {"experts_implementation": "grouped_mm"}
    counted = planning.measure_kept(config, LENGTH, "bfloat16", "plain")
    assert len(counted.layers) == config.num_hidden_layers
    kept = really_kept(config, torch.bfloat16, experts)
    assert counted.of_batch(1) + counted.fixed == pytest.approx(kept, rel=0.002)


def test_stand_in_of_our_experts_saves_what_the_real_ones_save() -> None:
    """The real operator knows its shapes without a GPU: what it saves is compared with what the stand-in saves."""
    pytest.importorskip("triton")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from hf_moe_cpt.kernels.experts import experts

    planning.register_counted()
    holder = nn.Module()

    def saved(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        with FakeTensorMode():
            holder.gate_up_proj = nn.Parameter(torch.empty(31, 2 * 64, 128, dtype=torch.bfloat16))
            holder.down_proj = nn.Parameter(torch.empty(31, 128, 64, dtype=torch.bfloat16))
            tokens = torch.empty(4096, 128, dtype=torch.bfloat16, requires_grad=True)
            index, gates = torch.zeros(4096, 3, dtype=torch.long), torch.empty(4096, 3, requires_grad=True)
            return sum(saved_storages(lambda: call(tokens, index, gates)).values())

    def real(tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        return experts(tokens, index, gates, holder.gate_up_proj, holder.down_proj, "silu")

    def stand_in(tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        return ALL_EXPERTS_FUNCTIONS[planning.OUR_EXPERTS](holder, tokens, index, gates)

    assert saved(stand_in) == pytest.approx(saved(real), rel=0.001)


@pytest.mark.parametrize(
    "config", [config_of("pb-granular-tiny"), config_of("llama-tiny"), GPT2], ids=["ours", "llama", "gpt2"]
)
def test_parameters_are_those_of_the_model(config: PreTrainedConfig) -> None:
    size, model = planning.measure_size(config, "it"), AutoModelForCausalLM.from_config(config)
    assert size.total == model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert size.is_tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert len(size.layers) == len(planning.layers_of(model)) == config.num_hidden_layers
    routed = [weight.numel() for name, weight in model.named_parameters() if "mlp.experts." in name]
    assert size.experts == sum(routed)
    unchosen = sum(routed) * (1 - 3 / 31)
    embedding = model.get_input_embeddings().weight.numel() * (not size.is_tied)
    assert size.active == pytest.approx(size.total - unchosen - embedding)


@pytest.mark.parametrize("gpus", [8, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["pb-granular-tiny", "llama-tiny"])
def test_fsdp_leaves_on_a_rank_what_is_planned(name: str, gpus: int) -> None:
    """FSDP2 itself, in a process group that only pretends; rows that do not divide are 2 % of tiny matrices."""
    model = AutoModelForCausalLM.from_config(config_of(name))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        for part in (*planning.layers_of(model), model):
            fully_shard(part, mesh=mesh)
        held = sum(weight.to_local().numel() for weight in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    planned = planning.parameters_held(
        planning.measure_size(config_of(name), name), planning.TrainingSetup(engine="fsdp2", gpus=gpus)
    )
    assert planned == pytest.approx(held, rel=0.02)


def test_mixed_precision_adds_copies_of_weights_and_wider_norms() -> None:
    config = config_of("pb-switch-tiny")
    mixed, lean = (planning.measure_kept(config, LENGTH, precision, "fused") for precision in ("mixed", "bfloat16"))
    plain = planning.measure_kept(config, LENGTH, "mixed", "plain")
    size = planning.measure_size(config, "it")
    matrices = size.total - size.embedding - size.head
    assert plain.fixed == pytest.approx(2 * matrices, rel=0.02)
    assert mixed.of_batch(1) > lean.of_batch(1)
    assert lean.of_batch(1) < planning.measure_kept(config, LENGTH, "bfloat16", "plain").of_batch(1)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--preset 'pb-granular-3b' is unknown: choose from dense-570m, "):
        read_config("pb-granular-3b", None)
    with pytest.raises(ValueError, match=r"is a folder without config\.json: give one that a model was saved in\.$"):
        read_config(None, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody knows"}')
    with pytest.raises(ValueError, match=r"has no configuration that can be read: "):
        read_config(None, str(tmp_path))
    with pytest.raises(ValueError, match=r"^m \(mamba\) has no attention heads: only models with them are planned\.$"):
        planning.measure_size(MambaConfig(), "m")
    config_of("pb-granular-tiny").save_pretrained(tmp_path)
    assert read_config(None, str(tmp_path)).num_experts == 31


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "decoder_sparse_step": 2}], ids=["alike", "every second"])
def test_few_layers_stand_for_all_that_are_alike(changes, monkeypatch):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts_per_tok=2,
        **{"num_experts": 6, **changes},
    )  # fmt: skip
    every, gathered = (planning.measure_all_kept(config, LENGTH, way, "fused") for way in ("mixed", "bfloat16"))
    monkeypatch.setattr(planning, "measure_all_kept", counting := Counting(planning.measure_all_kept))
    found = planning.measure_kept(config, LENGTH, "mixed", "fused")
    assert found == replace(every, gathered=gathered)
    assert counting.layers == (6 if changes else 3)


class Counting:
    """A call that remembers how many layers it was asked about."""

    def __init__(self, call):
        self.call, self.layers = call, 0

    def __call__(self, config, *args):
        self.layers = config.num_hidden_layers
        return self.call(config, *args)
