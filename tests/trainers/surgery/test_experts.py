"""Experts chosen by their use, and training that leaves every other weight bit for bit as it was.

Logits recorded from real models; KL, anchor, overlap and freezing against their definitions.
"""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.routing.hooks import moe_layers
from hf_moe_cpt.trainers.common.updates import freeze
from hf_moe_cpt.trainers.surgery import experts
from hf_moe_cpt.trainers.surgery.losses import token_weights
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_moes import BLOCKS, moe_model, padded_batch


FAMILIES = ["mixtral", "deepseek_v3", "cpt_moe"]


def find_routers(model):
    return [layer.router for layer in moe_layers(model)]


def test_affinity_is_the_mean_over_texts_of_their_mean_gate():
    model, batches = moe_model("qwen2_moe").train(), [padded_batch(0), padded_batch(1)]
    affinity = experts.expert_affinity(model, batches)
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


def test_ranks_share_their_texts(tmp_path, monkeypatch):
    model, batch = moe_model("mixtral"), padded_batch()
    alone = experts.expert_affinity(model, [batch])
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    seen = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda part: (seen.append(part.shape), reduce(part)))
    try:
        assert torch.equal(experts.expert_affinity(model, [batch]), alone)
    finally:
        leave_process_group()
    assert seen == [(2, 4), ()]


def test_the_largest_are_chosen_and_the_earlier_of_equals():
    affinity = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4]])
    assert experts.choose_experts(affinity, 1) == [(0, 1)]
    assert experts.choose_experts(affinity, 4) == [(0, 1), (1, 0), (1, 2), (0, 2)]


def _train(model: nn.Module, no_decay: list[str], steps: int = 2) -> dict[str, torch.Tensor]:
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
    targets = experts.train_only_experts(model, [(place, 2), (place, 0)])
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


def test_gradients_of_other_experts_are_0_even_if_they_are_no_numbers():
    model = moe_model("mixtral").double()
    experts.train_only_experts(model, [(0, 1)])
    model.to(torch.float32)  # hooks stay when the weights are moved
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    (weight * torch.full_like(weight, math.inf)).sum().backward()
    (weight * torch.full_like(weight, math.nan)).sum().backward()
    assert [bool(row.any()) for row in weight.grad] == [False, True, False, False]


@pytest.mark.parametrize("routers_first", [True, False])
def test_frozen_routers_stay_frozen(routers_first):
    model = moe_model("mixtral")
    if routers_first:
        freeze(model, ["router"])
    targets = experts.train_only_experts(model, [(0, 1)])
    if not routers_first:
        freeze(model, ["router"])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert (
        trained == set(targets.no_decay) == {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down")}
    )


def test_models_without_rows_to_train_and_no_text_are_refused():
    with pytest.raises(ValueError, match="No text came to find the experts that are used for it"):
        experts.expert_affinity(moe_model("mixtral"), [])
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(moe_model("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="trains an adapter: leave peft_config out, or set target_experts=0"):
        experts.train_only_experts(adapted, [(0, 0)])
    apart = moe_model("mixtral")
    apart.model.layers[1].mlp.experts.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"experts.extra.weight is \(3, 3\), not one row for each of 4 experts"):
        experts.train_only_experts(apart, [(1, 0)])


def _logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, width, dtype=torch.float64, generator=generator) for width in (3, 5, 4)]


def test_anchor_is_its_definition_with_its_gradient_and_takes_shares():
    logits = [z.requires_grad_() for z in _logits()]
    chosen, mask = [(2, 1), (0, 2), (2, 3)], torch.tensor([[True, True], [True, False]])
    value = experts.expert_anchor(logits, chosen, mask)
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
    mask = torch.tensor([True, True, False])
    at_target = torch.tensor([[0.0, 99.0, 0.0], [99.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    assert float(experts.expert_anchor([at_target], [(0, 1)], torch.tensor([True, False, False]))) == 0.0
    assert float(experts.expert_anchor([at_target], [(0, 1)], mask)) == pytest.approx(1.0)  # half of the farthest, 2
    shares = torch.tensor([0.75, 0.25, 0.0])
    assert float(experts.expert_anchor([at_target], [(0, 1)], mask, shares)) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_logits_are_those_of_the_layers(kind):
    model, batch = moe_model(kind).eval(), padded_batch()
    calls = []
    for router in find_routers(model):
        router.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad(), experts.RouterTap(model).record() as recorded:
        model(**batch, use_cache=False)
    for (router, args, _), logits in zip(calls, recorded, strict=True):
        product = functional.linear(args[0].flatten(0, -2), router.weight, getattr(router, "bias", None))
        torch.testing.assert_close(logits, product)
    assert len(calls) == len(BLOCKS[kind])


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_routers_once(kind, checkpointing):
    wanted, model, batch = moe_model(kind), moe_model(kind), padded_batch()
    heard: list[torch.Tensor] = []
    for router in find_routers(wanted):
        router.register_forward_hook(lambda *call: heard.append(call[2][0]))
    wanted(**batch)
    sum(logits.square().sum() for logits in heard).backward()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with experts.RouterTap(model).record() as recorded:
        model(**batch, use_cache=False)
        sum(logits.square().sum() for logits in recorded).backward()  # computes inside the context too
    assert len(recorded) == len(BLOCKS[kind])
    grads = dict(wanted.named_parameters())
    for name, parameter in model.named_parameters():
        if grads[name].grad is not None and grads[name].grad.abs().sum() > 0:
            torch.testing.assert_close(parameter.grad, grads[name].grad, msg=name)
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in find_routers(model))


def test_reentrant_checkpointing_is_refused_where_gradient_is_wanted_and_so_is_no_pass():
    model = moe_model("mixtral")
    with (
        pytest.raises(ValueError, match="0 of 2 MoE layers ran while their .*: run the whole model"),
        experts.RouterTap(model).record(),
    ):
        pass
    model.gradient_checkpointing_enable({"use_reentrant": True})
    wanted = 'set gradient_checkpointing_kwargs={"use_reentrant": False}'
    with pytest.raises(ValueError, match=wanted), experts.RouterTap(model).record():
        pass
    with torch.no_grad(), experts.RouterTap(model).record() as recorded:
        model(**padded_batch(), use_cache=False)
    assert len(recorded) == 2


def test_only_the_first_pass_is_recorded_and_nothing_outside():
    model, first, second = moe_model("qwen3_moe").eval(), padded_batch(0), padded_batch(1)
    tap = experts.RouterTap(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        with tap.record() as recorded:
            twin(**second)
            model(**first)
            model(**second)
        kept = [logits.clone() for logits in recorded]
        model(**second)
        with tap.record() as alone:
            model(**first)
    assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))
    assert all(not router._forward_hooks for router in find_routers(model))


def test_wrapped_models_and_adapters_are_recorded(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = moe_model("mixtral").eval(), padded_batch()
    with torch.no_grad(), experts.RouterTap(model).record() as plain:
        model(**batch)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        with torch.no_grad(), experts.RouterTap(wrapped).record() as recorded:
            wrapped(**batch)
        del wrapped
    finally:
        leave_process_group()
    settings = peft.LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj"], modules_to_save=["mlp.gate"], lora_dropout=0.0
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gate.modules_to_save" in name:
                parameter.neg_()
        with experts.RouterTap(adapted).record() as trained:
            adapted(**batch)
        with adapted.disable_adapter(), experts.RouterTap(adapted).record() as original:
            adapted(**batch)
    for place in (0, 1):
        assert torch.equal(recorded[place], plain[place])
        assert torch.equal(original[place], plain[place])
    torch.testing.assert_close(trained[0], -plain[0])


def _random_layers(seed: int, num_tokens: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, width, dtype=torch.float64, generator=generator) for width in (3, 5)]


def _kl_of_token(p: torch.Tensor, z: torch.Tensor) -> float:
    q = [math.exp(v) for v in z.tolist()]
    return sum(a * math.log(a * sum(q) / b) for a, b in zip(p.tolist(), q, strict=True) if a > 0)


def test_router_kl_is_its_definition_with_its_gradient():
    logits = [z.requires_grad_() for z in _random_layers(0)]
    before = experts.router_probs(_random_layers(1))
    before[0][3] = torch.tensor([0.0, 0.25, 0.75])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counted = [0, 1, 3]
    value = experts.router_kl(logits, before, mask)
    wanted = [_kl_of_token(p[t], z.detach()[t]) for z, p in zip(logits, before, strict=True) for t in counted]
    assert float(value.detach()) == pytest.approx(sum(wanted) / 6, rel=1e-12)
    value.backward()
    for z, p in zip(logits, before, strict=True):
        slope = (z.detach().softmax(-1) - p) / 6
        slope[[2, 4, 5]] = 0.0
        torch.testing.assert_close(z.grad, slope, rtol=0, atol=1e-14)


def test_router_kl_takes_shares_never_looks_at_padding_and_is_0_from_itself():
    logits, before = _random_layers(0), experts.router_probs(_random_layers(1))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights = token_weights(mask, "sequence", dtype=torch.float64)
    each = [
        sum(_kl_of_token(p[t], z[t]) for z, p in zip(logits, before, strict=True)) / 2 for t in range(4)
    ]  # mean over layers
    wanted = (sum(each[:3]) / 3 + each[3]) / 2
    for values in (*logits, *before):
        values[4:] = math.nan
    logits = [z.requires_grad_() for z in logits]
    value = experts.router_kl(logits, before, mask, weights)
    value.backward()
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12)
    assert all(bool(z.grad.isfinite().all()) and not bool(z.grad[4:].any()) for z in logits)
    logits = [z.float() for z in _random_layers(0)]
    mask = torch.ones(6, dtype=torch.bool)
    assert float(experts.router_kl(logits, experts.router_probs(logits), mask)) == pytest.approx(0.0, abs=1e-7)
    rounded = [g.bfloat16() for g in experts.router_probs(logits)]  # rows that do not sum to 1 would make it negative
    assert 0.0 <= float(experts.router_kl(logits, rounded, mask)) < 1e-5
    assert float(experts.router_kl([z + 3.0 for z in logits], experts.router_probs(logits), mask)) == pytest.approx(
        0.0, abs=1e-6
    )


def test_overlap_with_the_starting_model_is_counted_over_batches():
    model, batches = moe_model("olmoe").train(), [padded_batch(0), padded_batch(1)]

    def chosen():
        found = []
        with torch.no_grad():
            for batch in batches:
                model.eval()
                logits = model(**batch, output_router_logits=True).router_logits
                counts = batch["attention_mask"].flatten().bool()
                found.append([z[counts].topk(3).indices.tolist() for z in logits])
        model.train()
        return found

    watch, before = experts.SelectionWatch(model, lambda name: batches, ["unlearn", "update"]), chosen()
    assert model.training
    assert watch.measure(model) == {"unlearn_expert_overlap": 1.0, "unlearn_expert_overlap_min": 1.0}
    with torch.no_grad():
        find_routers(model)[1].weight.neg_()
    pairs = [pair for old, new in zip(before, chosen(), strict=True) for pair in zip(old[1], new[1], strict=True)]
    want = sum(len(set(a) & set(b)) / 3 for a, b in pairs) / len(pairs)
    found = watch.measure(model)
    assert found["unlearn_expert_overlap_min"] == pytest.approx(want) and want < 1.0
    assert found["unlearn_expert_overlap"] == pytest.approx((1.0 + want) / 2)
    assert experts.SelectionWatch(tiny_model("llama"), lambda name: batches, ["unlearn"]).measure(model) == {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_routers_are_frozen_and_nothing_else_is(kind):  # that they stay: test_surgery_course.py
    model = moe_model(kind)
    freeze(model, ["router"])
    frozen = {id(weight) for router in find_routers(model) for weight in router.parameters()}
    assert {id(weight) for weight in model.parameters() if not weight.requires_grad} == frozen


def test_adapters_of_routers_are_frozen_too():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"], lora_dropout=0.0)
    model = peft.get_peft_model(moe_model("mixtral"), settings)
    assert any(weight.requires_grad for name, weight in model.named_parameters() if ".gate." in name)
    freeze(model, ["router"])
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if ".gate." in name)
    assert any(weight.requires_grad for weight in model.parameters())


def test_the_chosen_are_those_that_kept_text_does_not_use():
    """By use alone the expert that everybody uses comes first."""
    model, gone, kept = moe_model("mixtral"), padded_batch(0), padded_batch(1)
    used, also = (experts.expert_affinity(model, [batch]) for batch in (gone, kept))
    want = experts.choose_experts(used - also, 2)
    assert want != experts.choose_experts(used, 2), "or nothing is shown"
    assert experts.target_experts(model, [gone], 2, [kept]).chosen == want


def test_calibrated_anchors_use_critical_experts_as_often_as_forgotten_text():
    """One choice in one layer, in closed form; then a model that chooses two experts in each of two layers."""
    gone, kept = torch.tensor([[0.6, 0.3, 0.1]]).double(), torch.tensor([[0.2, 0.3, 0.5]]).double()
    (weights,) = experts.calibration_factors(gone, kept)
    torch.testing.assert_close(weights / weights[1], torch.tensor([3.0, 1.0, 1.0]).double())
    torch.testing.assert_close((weights * kept[0]).sum(), torch.tensor(1.0).double())
    assert experts.calibration_factors(gone, torch.tensor([[0.0, 0.5, 0.5]]).double()).isfinite().all()
    model, rows = moe_model("qwen2_moe"), {"unlearn": padded_batch(0), "retain": padded_batch(1)}
    found = experts.ExpertCalibration(model, lambda name: [rows[name]], ["unlearn"], ["retain"])
    batch = rows["retain"]
    with found.tap.listening(), torch.no_grad():
        model(**batch)
        shares = found.shares("retain", batch["input_ids"].shape)
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    counts = batch["attention_mask"].bool()
    per_layer = []
    for z, factors in zip(logits, found.factors["retain"], strict=True):
        chosen = z.topk(model.config.num_experts_per_tok, -1).indices
        per_layer.append(factors[chosen].mean(-1).view(counts.shape))
    torch.testing.assert_close(shares, sum(per_layer) / len(per_layer))
    assert shares[counts].mean().item() == pytest.approx(1.0, rel=1e-5) and shares.std() > 0


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_projected_step_is_not_seen_by_retained_text(share):
    """Logits of retained inputs in float64, with all of their directions or the largest; what is left still moves."""
    model, kept = moe_model("deepseek_v3"), padded_batch(0)
    callback = experts.RouterProjection(model, [kept], share)
    routers, inputs = find_routers(model), {}
    hooks = [r.register_forward_pre_hook(lambda m, a, r=r: inputs.update({r: a[0].flatten(0, -2)})) for r in routers]
    with torch.no_grad():
        model(**kept)
    for hook in hooks:
        hook.remove()
    callback.on_pre_optimizer_step()
    before = [router.weight.detach().clone() for router in routers]
    with torch.no_grad():
        for router in routers:
            router.weight.add_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
    callback.on_optimizer_step()
    for router, start, basis in zip(routers, before, callback.bases, strict=True):
        x = inputs[router][kept["attention_mask"].flatten().bool()].double()
        step = (router.weight.detach() - start).double()
        values, vectors = torch.linalg.eigh(x.T @ x)
        assert values[-basis.shape[1] :].sum() >= share * values.sum() * (1 - 1e-9)
        assert basis.shape[1] == 1 or values[1 - basis.shape[1] :].sum() < share * values.sum()
        assert (step @ vectors[:, -basis.shape[1] :]).abs().max() < 1e-5
        assert basis.shape[1] == len(values) or step.abs().max() > 0.1
