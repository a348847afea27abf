"""The accuracies of `hf_moe_cpt.evaluation.statistics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from typing import Any

import datasets
import evaluate

from hf_moe_cpt.evaluation.statistics import PRIOR_SCALE, preference_accuracy


_DESCRIPTION = """\
How often a language model prefers the answer that people chose, from the log-probabilities it gives to both answers:
by their sums, by their means per token, and at equal lengths (logistic regression, in the spirit of the
length-controlled win rate of AlpacaEval 2). Each with a confidence interval. Ties count half.
"""

_CITATION = """\
@article{dubois2024lengthcontrolled,
  title = {Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators},
  author = {Dubois, Yann and Galambosi, Bal{\\'a}zs and Liang, Percy and Hashimoto, Tatsunori B.},
  journal = {arXiv preprint arXiv:2404.04475},
  year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    chosen_logps (list of float): log-probability of each chosen answer, summed over its tokens, in nats.
    rejected_logps (list of float): the same of each rejected answer.
    chosen_lengths (list of int): tokens of each chosen answer, at least 1.
    rejected_lengths (list of int): tokens of each rejected answer.
    ref_chosen_logps (list of float): the reference's log-probability of each chosen answer; configuration "reference".
    ref_rejected_logps (list of float): the same of each rejected answer; configuration "reference".
    confidence (float): of the intervals. Default 0.95.
    prior_scale (float): standard deviation, in log-odds, of the prior on the effect of length. Default 2.5.
Returns:
    accuracy (float): share of pairs whose chosen answer has the greater sum; with a reference, the greater log-ratio.
    length_normalized_accuracy (float): the same of sums divided by lengths.
    length_controlled_accuracy (float): the first one as fitted for answers of equal length; NaN if every pair differs
        by the same length, which cannot be told from quality.
    *_low, *_high (float): confidence intervals of the three.
    length_effect (float): fitted log-odds of winning by being longer; above 0, longer answers are preferred.
    num_pairs, num_ties (int): pairs; those with equal sums, which count half.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.statistics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> result = metric.compute(
    ...     chosen_logps=[-10.0, -12.0], rejected_logps=[-11.0, -10.0], chosen_lengths=[5, 12], rejected_lengths=[5, 2]
    ... )
    >>> result["accuracy"], result["length_normalized_accuracy"]
    (0.5, 1.0)
"""

_PAIR_COLUMNS = {
    "chosen_logps": "float64",
    "rejected_logps": "float64",
    "chosen_lengths": "int64",
    "rejected_lengths": "int64",
}
_REFERENCE_COLUMNS = {"ref_chosen_logps": "float64", "ref_rejected_logps": "float64"}
_COLUMNS = {"default": _PAIR_COLUMNS, "reference": _PAIR_COLUMNS | _REFERENCE_COLUMNS}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PreferenceAccuracy(evaluate.Metric):
    """Configuration "default" compares log-probabilities, "reference" log-ratios to a reference model."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _COLUMNS:
            raise ValueError(f"config_name={self.config_name!r} is unknown: choose from {', '.join(_COLUMNS)}.")
        columns = _COLUMNS[self.config_name]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()}),
            reference_urls=["https://arxiv.org/abs/2404.04475", "https://arxiv.org/abs/2410.04203"],
        )

    def _compute(
        self, *, confidence: float = 0.95, prior_scale: float = PRIOR_SCALE, **columns: Any
    ) -> dict[str, float | int]:
        """columns: those of the configuration, each with N values."""
        known = _COLUMNS[self.config_name]
        unknown = columns.keys() - known.keys()
        if unknown & _REFERENCE_COLUMNS.keys():
            raise ValueError("A reference needs its own configuration: evaluate.load(..., config_name='reference').")
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such input; there are {', '.join(known)}.")
        return preference_accuracy(**columns, confidence=confidence, prior_scale=prior_scale).as_dict()
