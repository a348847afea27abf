"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.evaluation.statistics import RESAMPLES, mean_intervals
from hf_moe_cpt.evaluation.text_metrics import exact_memorisation, extraction_strength, probability
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
How much of its texts a language model knows by heart, teacher-forced: the geometric mean of the tokens' probabilities,
the share of tokens that are its first choice, and how short a beginning is enough for it to complete the rest. Means
over texts, each with a confidence interval by the bootstrap.
"""

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

_KWARGS_DESCRIPTION = """
Args:
    logps (list of list of float): log-probability of each token of a text, in nats.
    hits (list of list of int): for each token 1 if it is the model's most likely one, else 0.
    groups (list of str, optional): what each text is about; texts of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    probability (float): exp(mean log-probability), in [0, 1].
    exact_memorisation (float): share of the tokens that are hit, in [0, 1].
    extraction_strength (float): 1 - k / n, k the shortest beginning after which all of n tokens are hit, in [0, 1].
    *_low, *_high (float): intervals of the three; NaN with a single text or group.
    num_texts (int): texts.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> result = metric.compute(logps=[[-0.1, -2.0, -0.1, -0.2], [-3.0, -4.0]], hits=[[1, 0, 1, 1], [0, 0]])
    >>> result["exact_memorisation"], result["extraction_strength"]
    (0.375, 0.25)
"""

_COLUMNS = {"logps": datasets.List(datasets.Value("float64")), "hits": datasets.List(datasets.Value("int8"))}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Memorisation(evaluate.Metric):
    """Rows are texts."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2205.10770", "https://arxiv.org/abs/2012.07805"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        logps: Sequence[Sequence[float]],
        hits: Sequence[Sequence[int]],
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "groups", "confidence", "resamples", "seed"))
        columns = {
            "probability": probability(logps),
            "exact_memorisation": exact_memorisation(hits),
            "extraction_strength": extraction_strength(hits),
        }
        return {**mean_intervals(columns, groups, confidence, resamples, seed), "num_texts": len(hits)}
