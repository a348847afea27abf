"""Scores of texts against full logits, whatever the batch; greedy continuations against an argmax loop."""

import numpy as np
import pytest
import torch

from hf_moe_cpt.scripts import eval_surgery_scoring
from hf_moe_cpt.scripts.eval_surgery_scoring import CountedText, continue_greedily, score_distances, score_tokens
from tests.helpers.tiny_models import VOCABULARY, tiny_model


def _model(kind: str = "llama", factor: float = 20.0, **changes: object):
    model = tiny_model(kind, **changes).double().eval()
    if kind != "llama":
        model.set_experts_implementation("eager")  # in float64
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def _texts(count: int) -> list[CountedText]:
    generator = torch.Generator().manual_seed(1)
    return [
        CountedText(torch.randint(VOCABULARY, (3 + 7 * i % 23,), generator=generator).tolist(), 1 + i % 2)
        for i in range(count)
    ]


def _log_softmax(model, text: CountedText) -> torch.Tensor:
    """(n, V): what the model says of each token that counts, alone in its batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text.ids])).logits[0]
    return logits[text.start - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "cpt_moe"])
def test_scores_are_those_of_full_logits_in_any_batch(kind, monkeypatch):
    monkeypatch.setattr(eval_surgery_scoring, "LOGITS_AT_ONCE", 5 * VOCABULARY)  # many chunks in a batch
    model, texts = _model(kind), _texts(11)
    for batch_size in (1, 4, 16):
        for text, score in zip(texts, score_tokens(model, texts, batch_size, with_moments=True), strict=True):
            logp, targets = _log_softmax(model, text), torch.tensor(text.ids[text.start :])
            mean = (logp.exp() * logp).sum(-1)
            variance = (logp.exp() * logp.square()).sum(-1) - mean.square()
            np.testing.assert_allclose(score.logp, logp[torch.arange(len(targets)), targets], atol=1e-10)
            np.testing.assert_array_equal(score.hit, logp.argmax(-1) == targets)
            np.testing.assert_allclose(score.mean, mean, atol=1e-10)
            np.testing.assert_allclose(score.std, variance.sqrt(), atol=1e-8)


def test_moments_are_left_out_unless_asked_for():
    (score,) = score_tokens(_model(), _texts(1), 1)
    assert len(score.logp) == len(score.hit) == 2 and len(score.mean) == len(score.std) == 0


def test_words_of_probability_zero_leave_the_moments_finite():
    model = _model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7:] *= 1e8
    for score in score_tokens(model, _texts(5), 2, with_moments=True):
        assert np.isfinite(score.mean).all() and np.isfinite(score.std).all()


def test_distances_are_the_divergence_of_the_reference_and_equal_first_choices():
    model, reference, texts = _model(), _model(factor=8.0), _texts(9)
    with torch.no_grad():
        reference.get_output_embeddings().weight.add_(torch.randn(VOCABULARY, 16, dtype=torch.float64) / 3)
    found = score_distances(model, reference, texts, 4)
    for text, distance in zip(texts, found, strict=True):
        ours, theirs = _log_softmax(model, text), _log_softmax(reference, text)
        np.testing.assert_allclose(distance.kl, (theirs.exp() * (theirs - ours)).sum(-1), atol=1e-10)
        np.testing.assert_array_equal(distance.agrees, ours.argmax(-1) == theirs.argmax(-1))
    agrees = np.concatenate([distance.agrees for distance in found])
    assert 0 < agrees.mean() < 1
    assert max(distance.kl.max() for distance in score_distances(model, model, texts, 4)) < 1e-12


def test_distances_need_one_vocabulary():
    with pytest.raises(ValueError, match="has 48 words and the one before 50: their KL is defined for one vocabulary"):
        score_distances(_model(), _model(vocab_size=50), _texts(1), 1)


def test_continuations_are_greedy_and_end_before_a_stop_token():
    model = _model()
    model.generation_config.repetition_penalty = 5.0  # the model's own settings must not matter
    prompts = [text.ids for text in _texts(5)]
    free = continue_greedily(model, prompts, 6, 2, stop=[])
    assert model.generation_config.repetition_penalty == 5.0
    for prompt, written in zip(prompts, free, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert written == ids[len(prompt) :]
    stop = free[0][2]
    stopped = continue_greedily(model, prompts, 6, 2, stop=[stop])
    for written, whole in zip(stopped, free, strict=True):
        assert written == (whole[: whole.index(stop)] if stop in whole else whole)


def test_no_rows_are_no_results():
    assert score_tokens(_model(), [], 4) == [] and continue_greedily(_model(), [], 4, 4, stop=[]) == []
