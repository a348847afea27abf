"""Accuracy on multiple-choice questions by perplexity: the model answers with the option that it finds likeliest.

Letters: Q questions, O options. The loss of an option is the mean negative log-probability of its tokens after the
question, in nats; its perplexity is the exponential of that, so the lowest of both is the same option.

Source: the evaluation of LLM Surgery (arXiv 2409.13054), whose options are scored one by one after the bare question,
without letters; that options which tie share the point is ours.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_moe_cpt.analysis.columns import Column, read_column, read_numbers


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "mcq_accuracy")  # for evaluate.load


def mcq_correct(option_losses: Sequence[Column] | np.ndarray, answers: Column) -> np.ndarray:
    """(Q,) in [0, 1]: 1 if the true option has the lowest loss, 1 / number of the lowest if several tie, else 0.

    option_losses: (Q, O) nats per token, O at least 2. A question with fewer options than others is filled up with
    infinity. answers: (Q,) place of the true option, an integer in [0, O).
    """
    losses = read_numbers("option_losses", option_losses, infinite=True)
    if losses.ndim != 2 or losses.shape[0] == 0 or losses.shape[1] < 2:
        raise ValueError(f"option_losses must be (questions, options) with two options or more, got {losses.shape}.")
    places = read_column("answers", answers, num_rows=len(losses))
    wrong = (places != np.floor(places)) | (places < 0) | (places >= losses.shape[1])
    if wrong.any():
        raise ValueError(
            f"answers holds {places[wrong][0]:g} at question {int(np.argmax(wrong))}: the place of the true option is "
            f"an integer from 0 to {losses.shape[1] - 1}."
        )
    best = losses == losses.min(axis=1, keepdims=True)
    return best[np.arange(len(losses)), places.astype(int)] / best.sum(axis=1)


def mcq_accuracy(option_losses: Sequence[Column] | np.ndarray, answers: Column) -> float:
    """Mean of `mcq_correct` in [0, 1]; guessing gives 1 / O."""
    return float(mcq_correct(option_losses, answers).mean())
