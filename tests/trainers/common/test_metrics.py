"""Losses by source and block against transformers' and loops over tokens; means, clocks; parameters and FLOPs.

Active parameters are compared with closed forms, FLOPs with torch's own counter.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_cpt.routing.hooks import active_parameters, experts_per_token
from hf_moe_cpt.trainers.common import metrics
from tests.helpers.tiny_models import VOCABULARY, tiny_model


VOCAB = 11


def _batch(sequences: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences, tokens, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (sequences, tokens), generator=generator)
    labels[torch.rand(sequences, tokens, generator=generator) < 0.3] = -100
    return logits, labels, torch.randint(0, 2, (sequences,), generator=generator)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 10_000), st.sampled_from([None, 7, "tensor"]))
def test_loss_is_that_of_transformers(sequences, tokens, seed, num_items):
    logits, labels, _ = _batch(sequences, tokens, seed)
    labels[0, 1] = 3  # at least one counted token
    num_items = torch.tensor(5) if num_items == "tensor" else num_items
    ours = metrics.LossRecorder()(logits, labels, VOCAB, num_items)
    theirs = ForCausalLMLoss(logits, labels, VOCAB, num_items)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 10_000))
def test_parts_equal_a_loop_over_tokens_in_float64(sequences, tokens, seed):
    tap, meter = metrics.LossRecorder(), metrics.SourceLosses(("new", "replay"))
    nats, count = [0.0, 0.0], [0, 0]
    for call in range(2):
        logits, labels, source = _batch(sequences, tokens, seed + call)
        with tap.tell(meter.listener(source)):
            tap(logits, labels, VOCAB)
        for b in range(sequences):
            for t in range(tokens - 1):
                if labels[b, t + 1] != -100:
                    nats[source[b]] -= logits[b, t].double().log_softmax(-1)[labels[b, t + 1]].item()
                    count[source[b]] += 1
    got = meter.pop()
    for index, name in enumerate(("new", "replay")):
        if count[index]:
            assert got[f"lm_loss/{name}"] == pytest.approx(nats[index] / count[index], rel=1e-6)
        else:
            assert f"lm_loss/{name}" not in got
    assert got["lm_loss"] == pytest.approx(sum(nats) / max(sum(count), 1), rel=1e-6)
    tap(logits, labels, VOCAB)  # nobody is told outside of `tell`
    assert meter.pop() == {}


def test_held_out_blocks_count_once_in_any_order_and_batch():
    logits, labels, _ = _batch(5, 9, 3)
    tap, held_out = metrics.LossRecorder(), metrics.HeldOutLoss(5)
    for blocks in ([4, 2], [0, 1, 3], [3, 0]):  # the last batch repeats, as data loaders do to fill it
        with tap.tell(held_out.listener(torch.tensor(blocks))):
            tap(logits[blocks], labels[blocks], VOCAB)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert held_out.mean() == pytest.approx(want.item(), rel=1e-6)


def test_attached_model_returns_the_same_loss_and_gradients():
    model = tiny_model("llama")
    ids = torch.randint(0, 32, (2, 6))
    before = model(ids, labels=ids).loss
    (want,) = torch.autograd.grad(before, model.lm_head.weight)
    tap, meter = metrics.LossRecorder(), metrics.SourceLosses(("new", "replay"))
    tap.attach(model)
    with tap.tell(meter.listener(torch.tensor([0, 1]))):
        after = model(ids, labels=ids).loss
    (got,) = torch.autograd.grad(after, model.lm_head.weight)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(got, want)
    assert set(meter.pop()) == {"lm_loss", "lm_loss/new", "lm_loss/replay"}


def test_models_that_do_not_say_what_is_needed_are_refused():
    with pytest.raises(ValueError, match="is a Linear, which has no `loss_function`: pass a causal LM"):
        metrics.LossRecorder().attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="names its experts per token by none of num_experts_per_tok"):
        experts_per_token(tiny_model("llama").config)


def test_means_over_calls_leave_out_what_is_absent():
    meter, there, absent = metrics.MeanMeter(), torch.tensor(True), torch.tensor(False)
    for value, is_there in ((3.0, there), (math.nan, absent), (5.0, there)):
        values = {"loss": torch.tensor(1.0), "cosine": torch.tensor(value), "never": torch.tensor(value)}
        meter.add(values, {"cosine": is_there, "never": absent})
    assert meter.pop() == {"loss": 1.0, "cosine": 4.0}
    assert meter.pop() == {}
    meter.add({"loss": torch.tensor(2.0), "cosine": torch.tensor(7.0)}, {"cosine": there})
    assert meter.pop() == {"loss": 2.0, "cosine": 7.0}


@pytest.fixture
def wait(monkeypatch):
    """Lets the clock of the meters go on, which stands still otherwise."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    return lambda seconds: setattr(clock, "now", clock.now + seconds)


def test_paused_time_does_not_count_even_when_nested(wait):
    meter = metrics.ThroughputMeter(tokens_per_step=100, flops_per_token=1e12, num_devices=2)
    assert meter.pop() == {}
    with meter.pause():  # before the clock runs, as the evaluation at the start
        wait(0.3)
    meter.begin()
    meter.end_step()
    wait(0.05)
    with meter.pause():
        wait(0.2)
        with meter.pause():
            wait(0.2)
    assert meter.pop() == pytest.approx({"tokens_per_second": 2000.0, "model_tflops": 1000.0})


class Slow(nn.Linear):
    """A forward pass that takes as long as its input says."""

    def __init__(self, wait):
        super().__init__(1, 1)
        self.wait = wait

    def forward(self, seconds):
        self.wait(seconds)
        return self.weight


class ThreeRanks:
    """What three ranks would tell each other: the second is slower by a quarter of a second."""

    def of_all(self, values):
        own = torch.tensor(values, dtype=torch.float64)
        return torch.stack([own, own + torch.tensor([0.0, 0.1, 0.25]), own])


def test_seconds_of_a_step_and_the_slowest_rank(wait):
    model = Slow(wait)
    timing = metrics.StepTiming(model)
    assert timing.pop() == {}
    for _ in range(2):
        with timing.waiting_for_data():
            wait(0.1)
        model(0.05)
        model.eval()(0.1)  # a reference's or an evaluation's
        model.train()
        timing.on_step_end(None, TrainerState(), TrainerControl())
    wait(0.02)  # in which the loss is read
    assert timing.pop() == pytest.approx({"runtime/step": 0.26, "runtime/data_wait": 0.1})
    timing.agreement = ThreeRanks()
    with timing.waiting_for_data():
        pass
    model(0.05)
    timing.on_step_end(None, TrainerState(), TrainerControl())
    ranks = timing.pop()
    wanted = {"runtime/step": 0.05, "runtime/data_wait": 0.1, "runtime/slowest_rank": 1}
    assert ranks == pytest.approx(wanted | {"runtime/rank_min": 0.05, "runtime/rank_max": 0.3})


def test_starting_losses_are_the_first_at_step_zero():
    history = [
        {"step": 0, "eval_new_loss": 4.0},
        {"step": 0, "eval_replay_loss": 2.0},
        {"step": 0, "eval_new_loss": 9.0},
        {"step": 5, "eval_new_loss": 3.0},
    ]
    assert metrics.starting_losses(history, ("new", "replay")) == {"new": 4.0, "replay": 2.0}
    assert metrics.starting_losses(history[3:], ("new", "replay")) == {}


def test_active_parameters_are_those_that_a_token_multiplies_with():
    embedding, one_expert = VOCABULARY * 16, 3 * 16 * 32
    dense, tied = (tiny_model("llama", tie_word_embeddings=is_tied) for is_tied in (False, True))
    assert active_parameters(dense) == sum(p.numel() for p in dense.parameters()) - embedding
    assert active_parameters(tied) == active_parameters(dense)  # the head counts once, as the head
    mixture = tiny_model("mixtral")
    total = sum(p.numel() for p in mixture.parameters())
    assert active_parameters(mixture) == total - embedding - 2 * (4 - 2) * one_expert


def test_flops_agree_with_what_torch_counts_for_a_dense_model():
    model = tiny_model("llama", attn_implementation="eager", num_hidden_layers=3)
    ids = torch.randint(0, VOCABULARY, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    full_attention = 6 * 3 * 16 * 32  # torch counts the masked half of the scores as well
    norms = 6 * (2 * 3 + 1) * 16  # our count takes norm weights for matrices
    assert counter.get_total_flops() / 32 == pytest.approx(
        metrics.flops_per_token(model, 32) + full_attention - norms, 0.02
    )
