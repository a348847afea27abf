"""Experts chosen by their use, and training that leaves every other weight bit for bit as it was."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_moe_cpt.trainers.instruments.ranks import leave_process_group
from hf_moe_cpt.trainers.surgery.expert_targets import (
    choose_experts,
    expert_affinity,
    expert_anchor,
    train_only_experts,
)
from hf_moe_cpt.trainers.surgery.routers import find_routers, freeze_routers
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_moes import BLOCKS, moe_model, padded_batch


FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "cpt_moe"]


# ---- choice ----


def test_affinity_is_the_mean_over_texts_of_their_mean_gate():
    model, batches = moe_model("qwen2_moe").train(), [padded_batch(0), padded_batch(1)]
    affinity = expert_affinity(model, batches)
    assert model.training and affinity.shape == (2, 5)
    model.eval()
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad():
                logits = model(ids[mask.bool()][None], output_router_logits=True).router_logits
            wanted += torch.stack([z.double().softmax(-1).mean(0) for z in logits]) / 6
    torch.testing.assert_close(affinity, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(affinity.sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_affinity_finds_the_expert_that_the_router_prefers():
    model = moe_model("mixtral")
    bias = torch.tensor([0.0, 0.0, 9.0, 0.0])
    find_routers(model)[1].register_forward_hook(lambda *call: (call[2][0] + bias, *call[2][1:]))
    affinity = expert_affinity(model, [padded_batch()])
    assert choose_experts(affinity, 1) == [(1, 2)] and float(affinity[1, 2]) > 0.99


def test_ranks_share_their_texts(tmp_path, monkeypatch):
    model, batch = moe_model("mixtral"), padded_batch()
    alone = expert_affinity(model, [batch])
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    seen = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda part: (seen.append(part.shape), reduce(part)))
    try:
        assert torch.equal(expert_affinity(model, [batch]), alone)
    finally:
        leave_process_group()
    assert seen == [(2, 4), ()]


def test_affinity_needs_text():
    with pytest.raises(ValueError, match="No text came to find the experts that are used for it"):
        expert_affinity(moe_model("mixtral"), [])


def test_the_largest_are_chosen_and_the_earlier_of_equals():
    affinity = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4]])
    assert choose_experts(affinity, 1) == [(0, 1)]
    assert choose_experts(affinity, 4) == [(0, 1), (1, 0), (1, 2), (0, 2)]
    assert choose_experts(affinity, 2, per_layer=True) == [(0, 1), (0, 2), (1, 0), (1, 2)]


@pytest.mark.parametrize(("num", "per_layer", "limit"), [(0, False, 6), (7, False, 6), (4, True, 3)])
def test_there_must_be_as_many(num, per_layer, limit):
    with pytest.raises(ValueError, match=rf"target_experts={num} must lie in \[1, {limit}\]"):
        choose_experts(torch.ones(2, 3), num, per_layer)


# ---- training ----


def _train(model: nn.Module, no_decay: list[str], steps: int = 3) -> dict[str, torch.Tensor]:
    """AdamW with weight decay on all that is not in no_decay; returns the weights before."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    groups = [
        {"params": [weight for name, weight in named.items() if name not in no_decay], "weight_decay": 0.1},
        {"params": [weight for name, weight in named.items() if name in no_decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(steps):
        batch = padded_batch(step)
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
    return before


@pytest.mark.parametrize("kind", [*FAMILIES, "gpt_oss", "llama4", "jamba"])
def test_only_the_chosen_experts_and_their_routers_move(kind):
    model = moe_model(kind)
    place = len(BLOCKS[kind]) - 1
    targets = train_only_experts(model, [(place, 2), (place, 0)])
    layer, (block, gate, width) = list(BLOCKS[kind].items())[place]
    experts_name, router_name = f"model.layers.{layer}.{block}", f"model.layers.{layer}.{gate}"
    before = _train(model, targets.no_decay)
    moved = 0
    for name, weight in model.named_parameters():
        rows = [not torch.equal(a, b) for a, b in zip(weight, before[name], strict=True)]
        if name.startswith(f"{experts_name}."):
            assert rows == [expert in (0, 2) for expert in range(width)], name
            moved += weight[0].numel() * 2
        elif name.startswith(f"{router_name}."):
            assert any(rows), name
            moved += weight.numel()
        else:
            assert not any(rows) and weight.grad is None, name
    assert targets.num_trained == moved
    assert targets.names == [f"{experts_name}[2]", f"{experts_name}[0]"]
    assert targets.no_decay == [name for name in before if name.startswith(f"{experts_name}.")]
    assert len(targets.no_decay) == (4 if kind == "gpt_oss" else 2)


def test_several_layers_have_targets_of_their_own():
    model = moe_model("cpt_moe")
    targets = train_only_experts(model, [(1, 6), (0, 3), (1, 1)])
    before = _train(model, targets.no_decay)
    for place, chosen in ((0, {3}), (1, {1, 6})):
        name = f"model.layers.{place}.mlp.experts.down_proj"
        rows = model.get_parameter(name).detach().unbind(), before[name].unbind()
        assert {expert for expert, (a, b) in enumerate(zip(*rows, strict=True)) if not torch.equal(a, b)} == chosen


def test_weight_decay_would_move_the_other_experts():
    model = moe_model("mixtral")
    train_only_experts(model, [(0, 1)])
    before = _train(model, [])
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(model.get_parameter(name)[0], before[name][0])


def test_gradients_of_other_experts_are_0_even_if_they_are_no_numbers():
    model = moe_model("mixtral").double()
    train_only_experts(model, [(0, 1)])
    model.to(torch.float32)  # hooks stay when the weights are moved
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    (weight * torch.full_like(weight, math.inf)).sum().backward()
    (weight * torch.full_like(weight, math.nan)).sum().backward()
    assert [bool(row.any()) for row in weight.grad] == [False, True, False, False]


def test_training_goes_back_to_all_weights():
    model = moe_model("mixtral")
    model.lm_head.weight.requires_grad_(False)
    train_only_experts(model, [(0, 1)]).close()
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {"lm_head.weight"}
    batch = padded_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(bool(row.any()) for row in model.get_parameter("model.layers.0.mlp.experts.down_proj").grad)


@pytest.mark.parametrize("routers_first", [True, False])
def test_frozen_routers_stay_frozen(routers_first):
    model = moe_model("mixtral")
    if routers_first:
        freeze_routers(model)
    targets = train_only_experts(model, [(0, 1)])
    if not routers_first:
        freeze_routers(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert (
        trained == set(targets.no_decay) == {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")}
    )


def test_models_without_rows_to_train_are_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match="target_experts needs a mixture of experts with fused weights, and found none"
    ):
        train_only_experts(tiny_model("llama"), [(0, 0)])
    adapted = peft.get_peft_model(moe_model("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="this model trains an adapter: leave peft_config out, or set target_experts=0"
    ):
        train_only_experts(adapted, [(0, 0)])
    apart = moe_model("mixtral")
    apart.model.layers[1].mlp.experts.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"experts.extra.weight is \(3, 3\), not one row for each of 4 experts"):
        train_only_experts(apart, [(1, 0)])


def test_experts_must_exist():
    model = moe_model("mixtral")
    for place, expert in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match=rf"Expert {expert} of MoE layer {place} does not exist: .* 2 MoE layers"):
            train_only_experts(model, [(0, 0), (place, expert)])
    with pytest.raises(ValueError, match="No expert is chosen"):
        train_only_experts(model, [])
    assert all(weight.requires_grad for weight in model.parameters())


# ---- anchor ----


def _logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, width, dtype=torch.float64, generator=generator) for width in (3, 5, 4)]


def test_anchor_is_its_definition_with_its_gradient():
    logits = [z.requires_grad_() for z in _logits()]
    chosen, mask = [(2, 1), (0, 2), (2, 3)], torch.tensor([[True, True], [True, False]])
    value = expert_anchor(logits, chosen, mask)
    value.backward()
    wanted = 0.0
    for place, targets in ((0, {2}), (2, {1, 3})):
        for token in range(4):
            z = logits[place].detach()[token]
            g = [math.exp(v) / sum(math.exp(u) for u in z.tolist()) for v in z.tolist()]
            gap = [p - (expert in targets) for expert, p in enumerate(g)]
            inner = sum(p * d for p, d in zip(g, gap, strict=True))
            slope = [2 * p * (d - inner) / 6 * (token < 3) for p, d in zip(g, gap, strict=True)]
            torch.testing.assert_close(logits[place].grad[token], torch.tensor(slope).double(), rtol=1e-6, atol=1e-8)
            wanted += sum(d * d for d in gap) / 6 * (token < 3)
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12)
    assert logits[1].grad is None


def test_anchor_is_0_at_the_target_and_takes_shares():
    mask = torch.tensor([True, True, False])
    at_target = torch.tensor([[0.0, 99.0, 0.0], [99.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    assert float(expert_anchor([at_target], [(0, 1)], torch.tensor([True, False, False]))) == 0.0
    assert float(expert_anchor([at_target], [(0, 1)], mask)) == pytest.approx(1.0)  # half of the farthest, 2
    shares = torch.tensor([0.75, 0.25, 0.0])
    assert float(expert_anchor([at_target], [(0, 1)], mask, shares)) == pytest.approx(0.5)


def test_anchor_brings_tokens_back_to_the_target():
    model, batch = moe_model("mixtral"), padded_batch()
    targets = train_only_experts(model, [(1, 3)])
    router = find_routers(model)[1]
    logits: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda *call: logits.append(call[2][0]))
    mask = batch["attention_mask"].bool()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    values = []
    for _ in range(20):
        logits.clear()
        model(**batch)
        value = expert_anchor([logits[0], logits[0]], targets.chosen, mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    handle.remove()
    assert values[-1] < 0.3 * values[0]
    assert choose_experts(expert_affinity(model, [batch])[1:], 1) == [(0, 3)]
