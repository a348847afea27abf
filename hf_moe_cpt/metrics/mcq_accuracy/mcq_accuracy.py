"""The accuracy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import mcq_correct


class McqAccuracy(metrics.Metric):
    """Share of multiple-choice questions whose true option a language model finds likeliest, by perplexity."""

    COLUMNS = {"default": {"option_losses": ["float64"], "answers": "int64"}}

    def score(
        self, *, option_losses: Sequence[Sequence[float]], answers: Sequence[int], **bootstrap: Any
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        correct = mcq_correct([*option_losses], answers)
        return {**mean_intervals({"accuracy": correct}, **bootstrap), "num_questions": len(correct)}
