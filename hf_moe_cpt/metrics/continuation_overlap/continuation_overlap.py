"""ROUGE-L of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import rouge_l


class ContinuationOverlap(metrics.Metric):
    """ROUGE-L of what a language model writes after the beginning of a text, against the true continuation."""

    COLUMNS = {"default": {"predictions": "string", "references": "string"}}

    def score(
        self, *, predictions: Sequence[str], references: Sequence[str], **bootstrap: Any
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        columns = {f"rouge_l_{name}": column for name, column in rouge_l(predictions, references)._asdict().items()}
        return {**mean_intervals(columns, **bootstrap), "num_texts": len(predictions)}
