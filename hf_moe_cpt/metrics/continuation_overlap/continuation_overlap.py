"""ROUGE-L of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.evaluation.statistics import RESAMPLES, mean_intervals
from hf_moe_cpt.evaluation.text_metrics import rouge_l
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
ROUGE-L of what a model writes after the beginning of a text, against the true continuation: the longest sequence of
words that both have in common, over the words of the prediction, of the reference, and the harmonic mean of both.
Means over texts, each with a confidence interval by the bootstrap.
"""

_CITATION = """\
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): what the model wrote.
    references (list of str): the true continuations.
    groups (list of str, optional): what each text is about; texts of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    rouge_l_precision, rouge_l_recall, rouge_l_f1 (float): in [0, 1].
    *_low, *_high (float): intervals of the three; NaN with a single text or group.
    num_texts (int): texts.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> metric.compute(predictions=["police kill the gunman"], references=["police killed the gunman"])["rouge_l_f1"]
    0.75
"""

_COLUMNS = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ContinuationOverlap(evaluate.Metric):
    """Rows are texts."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://aclanthology.org/W04-1013"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str],
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "groups", "confidence", "resamples", "seed"))
        columns = {f"rouge_l_{name}": column for name, column in rouge_l(predictions, references)._asdict().items()}
        return {**mean_intervals(columns, groups, confidence, resamples, seed), "num_texts": len(predictions)}
