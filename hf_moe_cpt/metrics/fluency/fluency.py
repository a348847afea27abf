"""N-gram entropy of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.evaluation.statistics import RESAMPLES, mean_intervals
from hf_moe_cpt.evaluation.text_metrics import ngram_entropy
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
Whether a model still writes language: the weighted entropy of the pairs and triples of words in what it writes, which
falls when a damaged model repeats itself. Mean over texts with a confidence interval by the bootstrap.
"""

_CITATION = """\
@article{wang2023easyedit,
  title = {{EasyEdit}: An Easy-to-use Knowledge Editing Framework for Large Language Models},
  journal = {arXiv preprint arXiv:2308.07269},
  year = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): what the model wrote, texts of about the same length.
    groups (list of str, optional): what each text is about; texts of one group are drawn together.
    confidence (float): of the interval. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    ngram_entropy (float): (2/3 H_2 + 4/3 H_3) / 2 in bits, at least 0.
    ngram_entropy_low, ngram_entropy_high (float): its interval; NaN with a single text or group.
    num_texts (int): texts.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import FLUENCY_METRIC_FOLDER
    >>> metric = evaluate.load(FLUENCY_METRIC_FOLDER)
    >>> metric.compute(predictions=["he said he said he said he said"])["ngram_entropy"] < 1
    True
"""

_COLUMNS = {"predictions": datasets.Value("string")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Fluency(evaluate.Metric):
    """Rows are texts."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2308.07269", "https://arxiv.org/abs/2202.05262"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "groups", "confidence", "resamples", "seed"))
        columns = {"ngram_entropy": ngram_entropy(predictions)}
        return {**mean_intervals(columns, groups, confidence, resamples, seed), "num_texts": len(predictions)}
