"""From the rows that evaluate hands a routing metric to the integer tensors of our functions. Source: ours."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_moe_cpt.analysis.top_k_index import check_top_k_index


def index_of_rows(name: str, rows: Sequence[Sequence[int]], num_experts: int | None = None) -> Tensor:
    """Rows of K expert numbers, one row a token: (T, K) int64.

    name: of the input, for messages. num_experts: what all numbers must be below; None does not look. Raises
    ValueError for no rows, for rows of many lengths, and for rows that name an expert twice or a negative one.
    """
    lists = [list(row) for row in rows]
    lengths = sorted({len(row) for row in lists})
    if len(lengths) != 1 or lengths[0] == 0:
        found = f"rows of {', '.join(map(str, lengths))} experts" if lists else "no rows"
        raise ValueError(f"{name} has {found}: give at least one token, and every token the same number of experts.")
    index = torch.tensor(lists, dtype=torch.int64)
    check_top_k_index(index, num_experts)
    ordered = index.sort(dim=1).values
    wrong = ((ordered[:, 1:] == ordered[:, :-1]).any(1) | (ordered[:, 0] < 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{name} has {lists[wrong[0]]} in row {wrong[0]}: the experts of a token are distinct and at least 0."
        )
    return index


def check_num_experts(num_experts: int | None) -> int:
    """The number of experts. Raises ValueError if it was not given or is below 1."""
    if num_experts is None or num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be given: experts that no token visits count too.")
    return num_experts
