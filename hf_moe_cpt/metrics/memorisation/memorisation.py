"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import exact_memorisation, extraction_strength, probability


class Memorisation(metrics.Metric):
    """How much of its texts a language model knows by heart: probability, exact memorisation, extraction strength."""

    COLUMNS = {"default": {"logps": ["float64"], "hits": ["int8"]}}

    def score(
        self, *, logps: Sequence[Sequence[float]], hits: Sequence[Sequence[int]], **bootstrap: Any
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        columns = {
            "probability": probability(logps),
            "exact_memorisation": exact_memorisation(hits),
            "extraction_strength": extraction_strength(hits),
        }
        return {**mean_intervals(columns, **bootstrap), "num_texts": len(hits)}
