"""`vocabulary_specialization` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_moe_cpt import metrics
from hf_moe_cpt.routing.metrics import VocabularyCounter, favourite_experts, vocabulary_specialization_from_counts


class VocabularySpecialization(metrics.Metric):
    """How far the token alone says which expert it goes to."""

    COLUMNS = {"default": {"token_ids": "int64", "top_k_index": ["int64"]}}
    OPTIONS = ("num_experts", "average", "favourite", "min_occurrences")

    def score(
        self,
        *,
        token_ids: Sequence[int],
        top_k_index: Sequence[Sequence[int]],
        num_experts: int | None = None,
        favourite: Sequence[int] | None = None,
        **choices: Any,
    ) -> dict[str, Any]:
        """Rows are tokens, in one layer. choices: as in `vocabulary_specialization_from_counts`."""
        index, num_experts = metrics.experts_of_rows(top_k_index, num_experts)
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
        given = None if favourite is None else torch.tensor(list(favourite))
        counter = VocabularyCounter(int(ids.max()) + 1 if given is None else len(given), num_experts)
        counter.add(ids, index)
        value = vocabulary_specialization_from_counts(counter.counts, counter.occurrences, favourite=given, **choices)
        own = favourite_experts(counter.counts).tolist()
        return {"vocabulary_specialization": value, "favourite": own, "num_tokens": len(index)}
