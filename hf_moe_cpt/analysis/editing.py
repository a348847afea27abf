"""Whether an update arrived: are the new answer's tokens the model's first choice, and is the old answer given up?

The same number has three names, by the question that is asked: reliability (the question of the edit),
generalisation (the same in other words) and portability (a question whose answer follows from the edit, by one hop or
by asking the other way round). Rows are questions.

Source: the evaluation of EasyEdit (arXiv 2308.07269), teacher-forced; the conflict score is ours.
"""

from pathlib import Path

import numpy as np

from hf_moe_cpt.analysis.columns import Column, TokenRows, read_column, read_token_rows


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "edit_success")  # for evaluate.load


def token_accuracy(hits: TokenRows | Column, tokens: Column | None = None) -> np.ndarray:
    """(questions,) in [0, 1]: share of the true answer's tokens that are the model's first choice, teacher-forced.

    hits: for each question a row of 0 and 1, one for each token of its answer. With `tokens` (questions,), the tokens
    of each answer, hits is (questions,) too: how many of them were hit.
    """
    if tokens is None:
        return np.array([row.mean() for row in read_token_rows("hits", hits, binary=True)])
    lengths = read_column("tokens", tokens)
    counts = read_column("hits", hits, num_rows=len(lengths))
    if lengths.min() < 1:
        raise ValueError(f"tokens holds {lengths.min():g}: an answer has at least 1 token.")
    wrong = (counts < 0) | (counts > lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"hits holds {counts[row]:g} at question {row}, whose answer has {lengths[row]:g} tokens.")
    return counts / lengths


def conflict_score(old_logp: Column, new_logp: Column) -> np.ndarray:
    """(questions,) in [0, 1]: P(old) / (P(old) + P(new)): 1/2 where both are as likely, 0 where the new answer won.

    old_logp, new_logp: (questions,) log-probabilities in nats of the answers from before and after the change; per
    token, so that the shorter answer has no advantage, or summed. Exact for probabilities that underflow.
    """
    old = read_column("old_logp", old_logp)
    new = read_column("new_logp", new_logp, num_rows=len(old))
    return np.exp(old - np.logaddexp(old, new))
