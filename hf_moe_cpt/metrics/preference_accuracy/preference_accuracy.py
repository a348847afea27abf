"""The accuracies of `hf_moe_cpt.evaluation.statistics` as a metric of the library evaluate."""

from typing import Any

from hf_moe_cpt.evaluation.statistics import preference_accuracy
from hf_moe_cpt.metrics import base


_CITATION = """\
@article{dubois2024lengthcontrolled,
  title = {Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators},
  author = {Dubois, Yann and Galambosi, Bal{\\'a}zs and Liang, Percy and Hashimoto, Tatsunori B.},
  journal = {arXiv preprint arXiv:2404.04475},
  year = {2024}
}
"""
_PAIRS = {
    "chosen_logps": "float64",
    "rejected_logps": "float64",
    "chosen_lengths": "int64",
    "rejected_lengths": "int64",
}


class PreferenceAccuracy(base.Metric):
    """How often a language model prefers the answer that people chose, from the log-probabilities it gives to both
    answers: by their sums, by their means per token, and at equal lengths (logistic regression, in the spirit of
    the length-controlled win rate of AlpacaEval 2). Each with a confidence interval. Ties count half.
    """

    CITATION = _CITATION
    URLS = ("https://arxiv.org/abs/2404.04475", "https://arxiv.org/abs/2410.04203")
    COLUMNS = {
        "default": _PAIRS,
        "reference": _PAIRS | {"ref_chosen_logps": "float64", "ref_rejected_logps": "float64"},
    }
    OPTIONS = ("confidence", "prior_scale")
    ARGS = """
    chosen_logps (list of float): log-probability of each chosen answer, summed over its tokens, in nats.
    rejected_logps (list of float): the same of each rejected answer.
    chosen_lengths (list of int): tokens of each chosen answer, at least 1.
    rejected_lengths (list of int): tokens of each rejected answer.
    ref_chosen_logps (list of float): the reference's log-probability of each chosen answer; configuration "reference".
    ref_rejected_logps (list of float): the same of each rejected answer; configuration "reference".
    confidence (float): of the intervals. Default 0.95.
    prior_scale (float): standard deviation, in log-odds, of the prior on the effect of length. Default 2.5.
    """
    RETURNS = """
    accuracy (float): share of pairs whose chosen answer has the greater sum; with a reference, the greater log-ratio.
    length_normalized_accuracy (float): the same of sums divided by lengths.
    length_controlled_accuracy (float): the first one as fitted for answers of equal length; NaN if every pair differs
        by the same length, which cannot be told from quality.
    *_low, *_high (float): confidence intervals of the three.
    length_effect (float): fitted log-odds of winning by being longer; above 0, longer answers are preferred.
    num_pairs, num_ties (int): pairs; those with equal sums, which count half.
    """
    EXAMPLE = """
    >>> result = metric.compute(
    ...     chosen_logps=[-10.0, -12.0], rejected_logps=[-11.0, -10.0], chosen_lengths=[5, 12], rejected_lengths=[5, 2]
    ... )
    >>> result["accuracy"], result["length_normalized_accuracy"]
    (0.5, 1.0)
    """

    def score(self, **given: Any) -> dict[str, float | int]:
        """given: as in `preference_accuracy`."""
        return preference_accuracy(**given).as_dict()
