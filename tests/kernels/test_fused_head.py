"""A model with the fused head has the losses, gradients and measurements of the same model without it."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_moe_cpt.kernels.fused_head as module
from hf_moe_cpt.kernels.fused_head import fuse_head
from hf_moe_cpt.trainers.instruments.loss_tap import LossTap, SourceLosses
from tests.helpers.kernel_device import DEVICE
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tolerances import assert_matches


def batch(sequences=3, tokens=9, seed=0):
    """Token ids, and labels that are partly ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (sequences, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(sequences, tokens, generator=generator) < 0.3, -100)
    labels[0, 1] = 5
    return ids.to(DEVICE), labels.to(DEVICE)


def pair(kind="cpt_moe", **changes):
    """The same model twice, the second with a fused head, both in training."""
    plain = tiny_model(kind, **changes).to(DEVICE).train()
    fused = deepcopy(plain)
    fuse_head(fused)
    return plain, fused


def run(model, ids, **inputs):
    model.zero_grad()
    output = model(input_ids=ids, **inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of hidden states that were given to the fused operator."""
    seen = []
    compute = module.linear_cross_entropy
    monkeypatch.setattr(
        module, "linear_cross_entropy", lambda *args: seen.append(tuple(args[0].shape)) or compute(*args)
    )
    return seen


MODELS = {
    "penalty-balanced": ("cpt_moe", {}),
    "switch": ("cpt_moe switch", {}),
    "sinkhorn": ("cpt_moe sinkhorn", {}),
    "dense": ("cpt_moe", {"num_experts": 0, "num_experts_per_tok": 0}),
    "tied head": ("cpt_moe", {"tie_word_embeddings": True}),
}
INPUTS = {
    "mean": {},
    "a number of tokens": {"num_items_in_batch": 7},
    "tokens on the device": {"num_items_in_batch": torch.tensor(23, device=DEVICE)},
    "labels already shifted": {"shift_labels": True},
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kind, changes", MODELS.values(), ids=MODELS)
def test_losses_and_every_gradient(calls, kind, changes, inputs):
    ids, labels = batch()
    inputs = {"labels": labels, **inputs}
    if "shift_labels" in inputs:
        inputs["shift_labels"] = labels.roll(-1, 1)
    plain, fused = pair(kind, **changes)
    (want, want_gradients), (got, got_gradients) = run(plain, ids, **inputs), run(fused, ids, **inputs)
    assert got.logits is None
    assert calls == [(27, 16)]
    for name in ("loss", "lm_loss", "aux_loss", "z_loss"):
        if getattr(want, name) is not None:
            assert_matches(name, getattr(got, name), getattr(want, name))
    for name, gradient in want_gradients.items():
        assert_matches(name, got_gradients[name], gradient, 2e-5)


def test_logits_are_there_where_they_are_wanted(calls):
    ids, labels = batch()
    plain, fused = pair()
    for inputs, is_training, are_skipped in (
        ({"labels": labels}, True, True),
        ({"labels": labels, "skip_logits": False}, True, False),
        ({"labels": labels}, False, False),
        ({"labels": labels, "skip_logits": True}, False, True),
        ({}, True, False),
        ({"skip_logits": True}, False, False),
        ({"logits_to_keep": 1}, False, False),
    ):
        calls.clear()
        plain.train(is_training), fused.train(is_training)
        want, got = plain(input_ids=ids, **inputs), fused(input_ids=ids, **inputs)
        assert (got.logits is None, len(calls)) == (are_skipped, are_skipped)
        assert want.logits is not None
        if not are_skipped:
            assert torch.equal(got.logits, want.logits)
        if "labels" in inputs:
            assert_matches("loss", got.loss, want.loss)


@pytest.mark.parametrize("is_training", [True, False])
def test_losses_per_source_are_the_same(calls, is_training):
    measured = []
    for model in pair():
        tap, meter = LossTap(), SourceLosses(("new", "replay"))
        tap.attach(model.train(is_training))
        for seed in range(2):
            ids, labels = batch(seed=seed)
            with tap.tell(meter.listener(torch.tensor([0, 1, 0]))):
                loss = model(
                    input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(31), skip_logits=True
                ).lm_loss
        measured.append(meter.pop() | {"loss": loss.item()})
    assert len(calls) == 2
    assert set(measured[0]) == {"lm_loss", "lm_loss/new", "lm_loss/replay", "loss"}
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)


def test_whoever_stands_between_the_head_and_its_weight_is_not_passed_over(calls):
    ids, labels = batch()
    _, hooked = pair()
    seen = []
    hooked.lm_head.register_forward_hook(lambda *args: seen.append(1))
    _, adapted = pair()
    adapted = get_peft_model(adapted, LoraConfig(target_modules=["lm_head"], r=2))
    _, replaced = pair()
    replaced.lm_head.forward = lambda states: nn.Linear.forward(replaced.lm_head, states) * 2
    _, biased = pair()
    biased.lm_head = nn.Linear(16, VOCABULARY).to(DEVICE)
    for model in (hooked, adapted, replaced, biased):
        assert model(input_ids=ids, labels=labels).logits is not None
    assert (calls, seen) == ([], [1])


def test_another_loss_function_gets_its_logits(calls):
    ids, labels = batch()
    _, fused = pair()
    fused.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    output = fused(input_ids=ids, labels=labels, output_router_logits=False)
    assert torch.equal(output.loss, output.logits.square().mean())
    assert calls == []


def test_only_this_model_changes(calls):
    ids, labels = batch()
    plain, fused = pair()
    fuse_head(fused)
    copy = deepcopy(fused)
    assert plain(input_ids=ids, labels=labels).logits is not None
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    assert copy(input_ids=ids, labels=labels).lm_loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())
    assert_matches("loss", fused(input_ids=ids, labels=labels).loss, plain(input_ids=ids, labels=labels).loss)
    assert "head_and_loss" not in vars(plain)


def test_a_model_without_the_seam_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no method `head_and_loss`"):
        fuse_head(tiny_model("llama"))


@pytest.mark.compiles
def test_one_graph():
    ids, labels = batch()
    plain, fused = pair("cpt_moe", num_experts=0, num_experts_per_tok=0)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compiled(input_ids=ids, labels=labels).loss.backward()
    _, want = run(plain, ids, labels=labels)
    for name, parameter in fused.named_parameters():
        assert_matches(name, parameter.grad, want[name], 2e-5)


def test_autocast(calls):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    ids, labels = batch()
    results = []
    for model in pair("cpt_moe", num_experts=0, num_experts_per_tok=0):
        with torch.autocast(DEVICE.type, dtype):
            results.append(run(model, ids, labels=labels))
    (want, want_gradients), (got, got_gradients) = results
    assert_matches("loss", got.loss, want.loss, 1e-5)
    assert len(calls) == 1
    for name, gradient in want_gradients.items():
        assert got_gradients[name].dtype == torch.float32
        assert_matches(name, got_gradients[name], gradient, 3e-2)


def test_generation_is_untouched():
    ids, _ = batch()
    plain, fused = pair()
    want, got = (model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (plain, fused))
    assert torch.equal(got, want)
