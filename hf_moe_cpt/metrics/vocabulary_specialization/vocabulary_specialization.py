"""`vocabulary_specialization` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_moe_cpt.metrics import base
from hf_moe_cpt.routing.metrics import VocabularyCounter, favourite_experts, vocabulary_specialization_from_counts


class VocabularySpecialization(base.Metric):
    """How far the token alone, without its context, says which expert it goes to: share of the visits of a token
    id to the expert that it visits most, at this checkpoint or at an earlier one, averaged over occurrences or
    over ids.
    """

    CITATION = base.OLMOE + base.CONTINUAL_MOE
    URLS = ("https://arxiv.org/abs/2409.02060", "https://arxiv.org/abs/2503.05029")
    COLUMNS = {"default": {"token_ids": "int64", "top_k_index": ["int64"]}}
    OPTIONS = ("num_experts", "average", "favourite", "min_occurrences")
    ARGS = """
    token_ids (list of int): id of each token; of the token that follows it, for specialisation on output tokens.
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts).
    num_experts (int): routed experts of the layer, E.
    average (str): "occurrences", every token counts alike, or "ids", every id does. Default "occurrences".
    favourite (list of int): for each id the expert that it visited most at an earlier checkpoint, -1 for none; as
        long as the vocabulary. Default: those of this text.
    min_occurrences (int): ids that occur less often do not count. Default 1.
    """
    RETURNS = """
    vocabulary_specialization (float): in [0, 1]; at least K/E with the text's own favourites; NaN if no id counts.
    favourite (list of int): for each id the expert that it visits most in this text, -1 for none.
    num_tokens (int): tokens.
    """
    EXAMPLE = """
    >>> text = {"token_ids": [5, 5, 5, 7], "top_k_index": [[0], [0], [1], [2]], "num_experts": 3}
    >>> metric.compute(**text)["vocabulary_specialization"]
    0.75
    """

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
        index, num_experts = base.experts_of_rows(top_k_index, num_experts)
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
        given = None if favourite is None else torch.tensor(list(favourite))
        counter = VocabularyCounter(int(ids.max()) + 1 if given is None else len(given), num_experts)
        counter.add(ids, index)
        value = vocabulary_specialization_from_counts(counter.counts, counter.occurrences, favourite=given, **choices)
        own = favourite_experts(counter.counts).tolist()
        return {"vocabulary_specialization": value, "favourite": own, "num_tokens": len(index)}
