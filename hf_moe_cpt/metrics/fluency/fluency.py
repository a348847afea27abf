"""N-gram entropy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import ngram_entropy


class Fluency(metrics.Metric):
    """Whether a language model still writes language, by the entropy of the word pairs and triples that it writes."""

    COLUMNS = {"default": {"predictions": "string"}}

    def score(self, *, predictions: Sequence[str], **bootstrap: Any) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        columns = {"ngram_entropy": ngram_entropy(predictions)}
        return {**mean_intervals(columns, is_share=False, **bootstrap), "num_texts": len(predictions)}
