"""ROUGE-L of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import rouge_l
from hf_moe_cpt.metrics import base


_CITATION = """\
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}
"""


class ContinuationOverlap(base.Metric):
    """ROUGE-L of what a model writes after the beginning of a text, against the true continuation: the longest
    sequence of words that both have in common, over the words of the prediction, of the reference, and the
    harmonic mean of both. Means over texts, each with a confidence interval by the bootstrap.
    """

    CITATION = _CITATION
    URLS = ("https://aclanthology.org/W04-1013",)
    COLUMNS = {"default": {"predictions": "string", "references": "string"}}
    ARGS = """
    predictions (list of str): what the model wrote.
    references (list of str): the true continuations.
    """
    RETURNS = """
    rouge_l_precision, rouge_l_recall, rouge_l_f1 (float): in [0, 1].
    *_low, *_high (float): intervals of the three; NaN with a single text or group.
    num_texts (int): texts.
    """
    EXAMPLE = """
    >>> metric.compute(predictions=["police kill the gunman"], references=["police killed the gunman"])["rouge_l_f1"]
    0.75
    """

    def score(
        self, *, predictions: Sequence[str], references: Sequence[str], **bootstrap: Any
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        columns = {f"rouge_l_{name}": column for name, column in rouge_l(predictions, references)._asdict().items()}
        return {**mean_intervals(columns, **bootstrap), "num_texts": len(predictions)}
