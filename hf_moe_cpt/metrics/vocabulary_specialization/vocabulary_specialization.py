"""`vocabulary_specialization` of `hf_moe_cpt.analysis` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from hf_moe_cpt.metrics.base import (
    check_num_experts,
    index_of_rows,
    refuse_missing_inputs,
    refuse_unknown_configuration,
    refuse_unknown_inputs,
)
from hf_moe_cpt.routing.metrics import VocabularyCounter, favourite_experts, vocabulary_specialization_from_counts


_DESCRIPTION = """\
How far the token alone, without its context, says which expert it goes to: share of the visits of a token id to the
expert that it visits most, at this checkpoint or at an earlier one, averaged over occurrences or over ids.
"""

_CITATION = """\
@article{muennighoff2024olmoe,
  title = {OLMoE: Open Mixture-of-Experts Language Models},
  author = {Muennighoff, Niklas and others},
  journal = {arXiv preprint arXiv:2409.02060},
  year = {2024}
}
@article{therien2025continual,
  title = {Continual Pre-training of MoEs: How robust is your router?},
  author = {Th{\\'e}rien, Benjamin and others},
  journal = {arXiv preprint arXiv:2503.05029},
  year = {2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    token_ids (list of int): id of each token; of the token that follows it, for specialisation on output tokens.
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts).
    num_experts (int): routed experts of the layer, E.
    average (str): "occurrences", every token counts alike, or "ids", every id does. Default "occurrences".
    favourite (list of int): for each id the expert that it visited most at an earlier checkpoint, -1 for none; as
        long as the vocabulary. Default: those of this text.
    min_occurrences (int): ids that occur less often do not count. Default 1.
Returns:
    vocabulary_specialization (float): in [0, 1]; at least K/E with the text's own favourites; NaN if no id counts.
    favourite (list of int): for each id the expert that it visits most in this text, -1 for none.
    num_tokens (int): tokens.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.metrics.base import VOCABULARY_SPECIALIZATION_FOLDER
    >>> metric = evaluate.load(VOCABULARY_SPECIALIZATION_FOLDER)
    >>> text = {"token_ids": [5, 5, 5, 7], "top_k_index": [[0], [0], [1], [2]], "num_experts": 3}
    >>> metric.compute(**text)["vocabulary_specialization"]
    0.75
"""

_INDEX = datasets.Sequence(datasets.Value("int64"))
_COLUMNS = {"token_ids": datasets.Value("int64"), "top_k_index": _INDEX}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VocabularySpecialization(evaluate.Metric):
    """Rows are tokens, in one layer."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2409.02060", "https://arxiv.org/abs/2503.05029"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        token_ids: Sequence[int],
        top_k_index: Sequence[Sequence[int]],
        num_experts: int | None = None,
        average: str = "occurrences",
        favourite: Sequence[int] | None = None,
        min_occurrences: int = 1,
        **unknown: Any,
    ) -> dict[str, Any]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "num_experts", "average", "favourite", "min_occurrences"))
        num_experts = check_num_experts(num_experts)
        index = index_of_rows("top_k_index", top_k_index, num_experts)
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
        given = None if favourite is None else torch.tensor(list(favourite))
        counter = VocabularyCounter(int(ids.max()) + 1 if given is None else len(given), num_experts)
        counter.add(ids, index)
        value = vocabulary_specialization_from_counts(
            counter.counts, counter.occurrences, favourite=given, average=average, min_occurrences=min_occurrences
        )
        own = favourite_experts(counter.counts).tolist()
        return {"vocabulary_specialization": value, "favourite": own, "num_tokens": len(index)}
