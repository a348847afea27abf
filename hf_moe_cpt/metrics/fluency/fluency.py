"""N-gram entropy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import ngram_entropy
from hf_moe_cpt.metrics import base


class Fluency(base.Metric):
    """Whether a model still writes language: the weighted entropy of the pairs and triples of words in what it
    writes, which falls when a damaged model repeats itself. Mean over texts with a confidence interval by the
    bootstrap.
    """

    CITATION = base.EASYEDIT
    URLS = ("https://arxiv.org/abs/2308.07269", "https://arxiv.org/abs/2202.05262")
    COLUMNS = {"default": {"predictions": "string"}}
    ARGS = """
    predictions (list of str): what the model wrote, texts of about the same length.
    """
    RETURNS = """
    ngram_entropy (float): (2/3 H_2 + 4/3 H_3) / 2 in bits, at least 0.
    ngram_entropy_low, ngram_entropy_high (float): its interval; NaN with a single text or group.
    num_texts (int): texts.
    """
    EXAMPLE = """
    >>> metric.compute(predictions=["he said he said he said he said"])["ngram_entropy"] < 1
    True
    """

    def score(self, *, predictions: Sequence[str], **bootstrap: Any) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        columns = {"ngram_entropy": ngram_entropy(predictions)}
        return {**mean_intervals(columns, **bootstrap), "num_texts": len(predictions)}
