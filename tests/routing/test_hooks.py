"""Experts and routers found in mixtures of experts that were not written here, and what the tap refuses."""

import pytest
import torch
from torch import nn

from hf_moe_cpt.routing.hooks import RoutingTap, moe_layers
from tests.helpers.tiny_moes import BLOCKS, moe_model, padded_batch


@pytest.mark.parametrize("kind", BLOCKS)
def test_layers_of_every_family(kind):
    model = moe_model(kind)
    found = [(layer.name, layer.router_name, layer.num_experts) for layer in moe_layers(model)]
    wanted = BLOCKS[kind].items()
    assert found == [(f"model.layers.{at}.{block}", f"model.layers.{at}.{gate}", e) for at, (block, gate, e) in wanted]
    for layer in moe_layers(model):
        assert model.get_submodule(layer.name) is layer.experts
        assert model.get_submodule(layer.router_name) is layer.router


class _Experts(nn.Module):
    num_experts = 3

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class _Block(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.experts = _Experts()
        for name, child in children.items():
            setattr(self, name, child)


def test_a_router_that_is_not_recorded_is_known_by_its_rows():
    block = _Block(shared_expert_gate=nn.Linear(4, 1), gate=nn.Linear(4, 3), up=nn.Linear(4, 5))
    assert [layer.router for layer in moe_layers(nn.Sequential(block))] == [block.gate]
    with pytest.raises(ValueError, match="The router of 0.experts is not known: the model class must record it"):
        moe_layers(nn.Sequential(_Block(up=nn.Linear(4, 5))))


def test_layers_under_an_adapter_are_those_of_the_model():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["mlp.gate"],
        lora_dropout=0.0,
    )
    model = peft.get_peft_model(moe_model("mixtral"), settings)
    prefix = "base_model.model.model.layers"
    assert [layer.name for layer in moe_layers(model)] == [f"{prefix}.{at}.mlp.experts" for at in (0, 1)]
    assert [layer.router_name for layer in moe_layers(model)] == [f"{prefix}.{at}.mlp.gate" for at in (0, 1)]
    assert [layer.num_experts for layer in moe_layers(model)] == [4, 4]
    assert any(name.endswith("gate.modules_to_save.default.weight") for name, _ in model.named_parameters())


def test_only_one_whole_pass_is_taken():
    model, batch = moe_model("mixtral").eval(), padded_batch()
    tap = RoutingTap(model)
    with torch.no_grad(), tap.listening():
        with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.experts ran not at all in one pass"):
            tap.take(18)
        model(**batch)
        model(**batch)
        with pytest.raises(ValueError, match="ran more than once in one pass: its routing cannot be traced"):
            tap.take(18)
        model(**batch)
        with pytest.raises(ValueError, match="saw 18 tokens of a batch of 5: its routing cannot be told apart"):
            tap.take(5)
        model(**batch)
        assert [routing.experts.shape for routing in tap.take(18)] == [(18, 2), (18, 2)]
    model(**batch)
    with pytest.raises(ValueError, match="ran not at all"):
        tap.take(18)


def test_experts_that_run_without_their_router():
    model = moe_model("mixtral").eval()
    experts = model.model.layers[0].mlp.experts
    for with_probabilities, text in ((True, "The router model.layers.0.mlp.gate did not"), (False, "layers.1.mlp")):
        tap = RoutingTap(model, with_probabilities)
        with torch.no_grad(), tap.listening():
            experts(torch.zeros(3, 16), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))
            with pytest.raises(ValueError, match=text):
                tap.take(3)
