"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import exact_memorisation, extraction_strength, probability
from hf_moe_cpt.metrics import base


_CITATION = """\
@article{tirumala2022memorization,
  title = {Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models},
  journal = {arXiv preprint arXiv:2205.10770},
  year = {2022}
}
@article{carlini2021extracting,
  title = {Extracting Training Data from Large Language Models},
  journal = {arXiv preprint arXiv:2012.07805},
  year = {2021}
}
"""


class Memorisation(base.Metric):
    """How much of its texts a language model knows by heart, teacher-forced: the geometric mean of the tokens'
    probabilities, the share of tokens that are its first choice, and how short a beginning is enough for it to
    complete the rest. Means over texts, each with a confidence interval by the bootstrap.
    """

    CITATION = _CITATION
    URLS = ("https://arxiv.org/abs/2205.10770", "https://arxiv.org/abs/2012.07805")
    COLUMNS = {"default": {"logps": ["float64"], "hits": ["int8"]}}
    ARGS = """
    logps (list of list of float): log-probability of each token of a text, in nats.
    hits (list of list of int): for each token 1 if it is the model's most likely one, else 0.
    """
    RETURNS = """
    probability (float): exp(mean log-probability), in [0, 1].
    exact_memorisation (float): share of the tokens that are hit, in [0, 1].
    extraction_strength (float): 1 - k / n, k the shortest beginning after which all of n tokens are hit, in [0, 1].
    *_low, *_high (float): intervals of the three; NaN with a single text or group.
    num_texts (int): texts.
    """
    EXAMPLE = """
    >>> result = metric.compute(logps=[[-0.1, -2.0, -0.1, -0.2], [-3.0, -4.0]], hits=[[1, 0, 1, 1], [0, 0]])
    >>> result["exact_memorisation"], result["extraction_strength"]
    (0.375, 0.25)
    """

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
