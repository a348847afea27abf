"""`router_saturation` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence

from hf_moe_cpt.metrics import base
from hf_moe_cpt.routing.metrics import router_saturation


class RouterSaturation(base.Metric):
    """How many of a token's experts are still those that it had at an earlier checkpoint, a mean over the tokens
    of a layer: 1 is unchanged, K/E what two unrelated routers reach.
    """

    CITATION = base.OLMOE + base.CONTINUAL_MOE
    URLS = ("https://arxiv.org/abs/2409.02060", "https://arxiv.org/abs/2503.05029")
    COLUMNS = {"default": {"before": ["int64"], "after": ["int64"]}}
    OPTIONS = ()
    ARGS = """
    before (list of list of int): the K experts of each token at the earlier checkpoint, distinct, in any order.
    after (list of list of int): those of the same tokens in the same order at the later checkpoint.
    """
    RETURNS = """
    router_saturation (float): share of a token's experts that it had before too, in [0, 1].
    num_tokens (int): tokens.
    """
    EXAMPLE = """
    >>> metric.compute(before=[[0, 1], [2, 3]], after=[[1, 0], [2, 0]])["router_saturation"]
    0.75
    """

    def score(self, *, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> dict[str, float | int]:
        """Rows are tokens, in one layer."""
        old, new = base.index_of_rows("before", before), base.index_of_rows("after", after)
        return {"router_saturation": router_saturation(old, new), "num_tokens": len(old)}
