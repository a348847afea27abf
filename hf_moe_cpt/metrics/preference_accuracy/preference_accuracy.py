"""The accuracies of `hf_moe_cpt.evaluation.statistics` as a metric of the library evaluate."""

from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import preference_accuracy


_PAIRS = {
    "chosen_logps": "float64",
    "rejected_logps": "float64",
    "chosen_lengths": "int64",
    "rejected_lengths": "int64",
}


class PreferenceAccuracy(metrics.Metric):
    """How often a language model prefers the answer that people chose, plain, per token and at equal lengths."""

    COLUMNS = {
        "default": _PAIRS,
        "reference": _PAIRS | {"ref_chosen_logps": "float64", "ref_rejected_logps": "float64"},
    }
    OPTIONS = ("confidence", "prior_scale")

    def score(self, **given: Any) -> dict[str, float | int]:
        """given: as in `preference_accuracy`."""
        return preference_accuracy(**given).as_dict()
