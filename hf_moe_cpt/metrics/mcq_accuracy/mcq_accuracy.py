"""The accuracy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.evaluation.statistics import RESAMPLES, mean_intervals
from hf_moe_cpt.evaluation.text_metrics import mcq_correct
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
Share of multiple-choice questions whose true option has the lowest perplexity of all options. Options that tie for the
lowest share the point. With a confidence interval by the bootstrap, of whole groups of questions if groups are given.
"""

_CITATION = """\
@article{veldanda2024llmsurgery,
  title = {LLM Surgery: Efficient Knowledge Unlearning and Editing in Large Language Models},
  journal = {arXiv preprint arXiv:2409.13054},
  year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    option_losses (list of list of float): nats per token of each option of a question, given the question; a question
        with fewer options than others is filled up with infinity.
    answers (list of int): place of the true option, from 0.
    groups (list of str, optional): what each question is about; questions of one group are drawn together.
    confidence (float): of the interval. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    accuracy (float): in [0, 1]; guessing gives 1 / options.
    accuracy_low, accuracy_high (float): its interval; NaN with a single question or group.
    num_questions (int): questions.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> metric.compute(option_losses=[[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]], answers=[0, 2])["accuracy"]
    0.5
"""

_COLUMNS = {"option_losses": datasets.List(datasets.Value("float64")), "answers": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class McqAccuracy(evaluate.Metric):
    """Rows are questions."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2409.13054"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        option_losses: Sequence[Sequence[float]],
        answers: Sequence[int],
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "groups", "confidence", "resamples", "seed"))
        correct = mcq_correct([*option_losses], answers)
        found = mean_intervals({"accuracy": correct}, groups, confidence, resamples, seed)
        return {**found, "num_questions": len(correct)}
