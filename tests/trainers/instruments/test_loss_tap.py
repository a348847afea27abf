"""The measured loss is transformers' loss, and its parts by source are what a loop over tokens gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_cpt.trainers.instruments.loss_tap import HeldOutLoss, LossTap, SourceLosses


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
    ours = LossTap()(logits, labels, VOCAB, num_items)
    theirs = ForCausalLMLoss(logits, labels, VOCAB, num_items)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 10_000))
def test_parts_equal_a_loop_over_tokens_in_float64(sequences, tokens, seed):
    tap, meter = LossTap(), SourceLosses(("new", "replay"))
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
    assert meter.pop() == {}


def test_nobody_is_told_outside_of_tell():
    tap, meter = LossTap(), SourceLosses(("new", "replay"))
    logits, labels, source = _batch(2, 4, 0)
    with tap.tell(meter.listener(source)):
        pass
    tap(logits, labels, VOCAB)
    assert meter.pop() == {}


def test_held_out_blocks_count_once_in_any_order_and_batch():
    logits, labels, _ = _batch(5, 9, 3)
    tap, held_out = LossTap(), HeldOutLoss(5)
    for blocks in ([4, 2], [0, 1, 3], [3, 0]):  # the last batch repeats, as data loaders do to fill it
        with tap.tell(held_out.listener(torch.tensor(blocks))):
            tap(logits[blocks], labels[blocks], VOCAB)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert held_out.mean() == pytest.approx(want.item(), rel=1e-6)


def test_attached_model_returns_the_same_loss_and_gradients():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 32, (2, 6))
    before = model(ids, labels=ids).loss
    (want,) = torch.autograd.grad(before, model.lm_head.weight)
    tap, meter = LossTap(), SourceLosses(("new", "replay"))
    tap.attach(model)
    with tap.tell(meter.listener(torch.tensor([0, 1]))):
        after = model(ids, labels=ids).loss
    (got,) = torch.autograd.grad(after, model.lm_head.weight)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(got, want)
    assert set(meter.pop()) == {"lm_loss", "lm_loss/new", "lm_loss/replay"}


def test_a_model_that_is_not_of_transformers_is_refused():
    with pytest.raises(ValueError, match="is a Linear, which has no `loss_function`: pass a causal LM"):
        LossTap().attach(torch.nn.Linear(2, 2))
