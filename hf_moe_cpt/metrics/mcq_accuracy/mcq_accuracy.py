"""The accuracy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import mcq_correct
from hf_moe_cpt.metrics import base


_CITATION = """\
@article{veldanda2024llmsurgery,
  title = {LLM Surgery: Efficient Knowledge Unlearning and Editing in Large Language Models},
  journal = {arXiv preprint arXiv:2409.13054},
  year = {2024}
}
"""


class McqAccuracy(base.Metric):
    """Share of multiple-choice questions whose true option has the lowest perplexity of all options. Options that
    tie for the lowest share the point. With a confidence interval by the bootstrap, of whole groups of questions
    if groups are given.
    """

    CITATION = _CITATION
    URLS = ("https://arxiv.org/abs/2409.13054",)
    COLUMNS = {"default": {"option_losses": ["float64"], "answers": "int64"}}
    ARGS = """
    option_losses (list of list of float): nats per token of each option of a question, given the question; a question
        with fewer options than others is filled up with infinity.
    answers (list of int): place of the true option, from 0.
    """
    RETURNS = """
    accuracy (float): in [0, 1]; guessing gives 1 / options.
    accuracy_low, accuracy_high (float): its interval; NaN with a single question or group.
    num_questions (int): questions.
    """
    EXAMPLE = """
    >>> metric.compute(option_losses=[[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]], answers=[0, 2])["accuracy"]
    0.5
    """

    def score(
        self, *, option_losses: Sequence[Sequence[float]], answers: Sequence[int], **bootstrap: Any
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        correct = mcq_correct([*option_losses], answers)
        return {**mean_intervals({"accuracy": correct}, **bootstrap), "num_questions": len(correct)}
