"""`router_saturation` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence

from hf_moe_cpt import metrics
from hf_moe_cpt.routing.metrics import router_saturation


class RouterSaturation(metrics.Metric):
    """How many of a token's experts are still those of an earlier checkpoint."""

    COLUMNS = {"default": {"before": ["int64"], "after": ["int64"]}}
    OPTIONS = ()

    def score(self, *, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> dict[str, float | int]:
        """Rows are tokens, in one layer."""
        old, new = metrics.index_of_rows("before", before), metrics.index_of_rows("after", after)
        return {"router_saturation": router_saturation(old, new), "num_tokens": len(old)}
