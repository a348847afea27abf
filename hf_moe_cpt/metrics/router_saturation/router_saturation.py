"""`router_saturation` of `hf_moe_cpt.analysis` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.metrics.base import (
    index_of_rows,
    refuse_missing_inputs,
    refuse_unknown_configuration,
    refuse_unknown_inputs,
)
from hf_moe_cpt.routing.metrics import router_saturation


_DESCRIPTION = """\
How many of a token's experts are still those that it had at an earlier checkpoint, a mean over the tokens of a
layer: 1 is unchanged, K/E what two unrelated routers reach.
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
    before (list of list of int): the K experts of each token at the earlier checkpoint, distinct, in any order.
    after (list of list of int): those of the same tokens in the same order at the later checkpoint.
Returns:
    router_saturation (float): share of a token's experts that it had before too, in [0, 1].
    num_tokens (int): tokens.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.metrics.base import ROUTER_SATURATION_FOLDER
    >>> metric = evaluate.load(ROUTER_SATURATION_FOLDER)
    >>> metric.compute(before=[[0, 1], [2, 3]], after=[[1, 0], [2, 0]])["router_saturation"]
    0.75
"""

_INDEX = datasets.Sequence(datasets.Value("int64"))
_COLUMNS = {"before": _INDEX, "after": _INDEX}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RouterSaturation(evaluate.Metric):
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
        self, *, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], **unknown: Any
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, _COLUMNS)
        old, new = index_of_rows("before", before), index_of_rows("after", after)
        return {"router_saturation": router_saturation(old, new), "num_tokens": len(old)}
