"""Kernels that a trainer chooses: the same losses and gradients as transformers' own way, and a reason where not."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from hf_moe_cpt.kernels.experts_interface import DISTRIBUTED
from hf_moe_cpt.routing.hooks import listen, moe_layers
from hf_moe_cpt.trainers.common import kernels
from hf_moe_cpt.trainers.common.kernels import choose_experts, compile_layers, use_kernels
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from tests.helpers.expert_layers import DEVICE
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tiny_moes import CONFIGS, moe_model


FAMILIES = sorted({*CONFIGS, "cpt_moe", "cpt_moe sinkhorn", "llama", "mixtral"})


def model_of(family: str) -> nn.Module:
    model = moe_model(family).to(DEVICE).train()
    model.config.use_cache = False  # as Trainer sets it
    return model


def batch(length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


QUICK = ("olmoe",)


@pytest.mark.compiles
@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_compiled_layers_give_the_same_gradients_and_their_routing_is_heard_at_every_step(fresh, family):
    """Against the same model uncompiled; the hooks of `listen` are new ones at each step."""
    plain = model_of(family)
    fast = deepcopy(plain)
    assert compile_layers(fast, backend="aot_eager") > 0
    want = gradients(plain)
    for _ in range(2):
        heard = []
        with listen(moe_layers(fast), lambda place, experts, logits, heard=heard: heard.append(place)):
            got = gradients(fast)
        assert heard == list(range(len(moe_layers(fast))))
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.compiles
@pytest.mark.parametrize("family", ["olmoe", "cpt_moe"])
def test_recorders_of_transformers_split_no_graph_and_record_as_before(fresh, family):
    """A layer is one graph before its block of experts and one after it, also where hidden states were asked for."""
    model = model_of(family)
    asked = batch() | {"output_hidden_states": True}
    want = model(**asked).hidden_states
    compile_layers(model, backend="eager")
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 2
    for hidden, expected in zip(model(**asked).hidden_states, want, strict=True):
        torch.testing.assert_close(hidden, expected)


@pytest.mark.slow
@pytest.mark.compiles
def test_layers_share_their_graphs_and_passes_without_gradient_need_none(fresh):
    compiled = {}
    for layers in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model("mixtral", num_hidden_layers=layers, use_cache=False).train()
        compile_layers(model, backend="aot_eager")
        gradients(model)
        compiled[layers] = counters["frames"]["ok"]
        with torch.no_grad():
            model(**batch(7))
        assert counters["frames"]["ok"] == compiled[layers]
    assert compiled[2] == compiled[6] > 0


@pytest.mark.compiles
@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_layers_are_compiled_inside_checkpoints_too(fresh, family):
    """Against the same model uncompiled and without checkpoints; graphs run in the forward pass and again after it."""
    plain, ran = model_of(family), []
    fast = deepcopy(plain)

    def backend(graph, inputs):
        run = lookup_backend("aot_eager")(graph, inputs)
        return lambda *args: ran.append(1) or run(*args)

    fast.gradient_checkpointing_enable({"use_reentrant": False})
    compile_layers(fast, backend=backend)
    want = gradients(plain)
    for _ in range(2):
        fast.zero_grad()
        ran.clear()
        loss = fast(**batch()).loss
        forward = len(ran)
        loss.backward()
        assert len(ran) > forward > 0
        got = {name: weight.grad for name, weight in fast.named_parameters() if weight.grad is not None}
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_weights_that_will_be_gathered_do_not_keep_experts_from_our_kernels(monkeypatch):
    """While they are dealt to ranks they are distributed tensors, and whole or local where they run."""
    model = model_of("olmoe")
    monkeypatch.setattr(kernels, "why_unsupported", lambda *_: DISTRIBUTED)
    assert choose_experts(model, DEVICE, None) == "experts hf_moe_cpt"


@pytest.mark.compiles
def test_a_layer_that_cannot_be_compiled_runs_as_before_and_says_so_once(fresh, caplog):
    def broken(graph, inputs):
        raise NotImplementedError("no such backend\nand more")

    plain = model_of("llama")
    fast = deepcopy(plain)
    compile_layers(fast, backend=broken)
    with caplog.at_level(logging.WARNING, kernels.__name__):
        got = gradients(fast)
    for name, gradient in gradients(plain).items():
        assert torch.equal(got[name], gradient)
    (told,) = caplog.messages
    assert told.startswith("LlamaDecoderLayer cannot be compiled") and "\n" not in told


CHOSEN = {
    "olmoe": "experts hf_moe_cpt",
    "llama": "",
    "gpt_oss": "experts hf_moe_cpt",
    "cpt_moe": "experts hf_moe_cpt",
}


@pytest.mark.parametrize("family, told", CHOSEN.items(), ids=CHOSEN)
def test_experts_are_chosen_where_the_kernels_run_them(family, told):
    model = model_of(family)
    assert choose_experts(model, DEVICE, None) == told
    if told.startswith("experts hf"):
        assert model.config._experts_implementation == "hf_moe_cpt"
        model.set_experts_implementation("batched_mm")
        assert choose_experts(model, DEVICE, None) == "experts batched_mm"  # somebody chose it


def test_experts_that_the_kernels_do_not_run_stay_as_they_were_and_it_is_said_why():
    model = model_of("olmoe")
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.act_fn = torch.nn.Tanh()
    before = model.config._experts_implementation
    assert choose_experts(model, DEVICE, None) == f"experts {before} (its activation is Tanh)"
    assert model.config._experts_implementation == before


def test_nothing_is_touched_on_the_cpu_or_where_plain_is_asked_for():
    model = model_of("cpt_moe")
    for how, device in (("auto", "cpu"), ("plain", "cuda")):
        args = SimpleNamespace(kernels=how, device=torch.device(device), n_gpu=1)
        assert use_kernels(model, args, fuses_head=True) == []
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="kernels='fast' is unknown: choose one of auto, plain"):
        CPTConfig(output_dir="unused", max_steps=1, kernels="fast")


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "llama"])
def test_on_a_gpu_all_of_it_gives_the_loss_of_plain(fresh, family):
    plain = model_of(family)
    fast = deepcopy(plain)
    args = SimpleNamespace(kernels="auto", device=DEVICE, n_gpu=1, bf16=False, use_liger_kernel=False)
    args.torch_compile = args.fsdp = args.deepspeed = False
    kernels.choose_attention(fast, args, 128)
    use_kernels(fast, args, fuses_head=True)
    torch.testing.assert_close(fast(**batch()).loss, plain(**batch()).loss, rtol=1e-3, atol=1e-3)
