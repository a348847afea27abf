"""From the rows that evaluate hands a routing metric to the integer tensors of our functions. Source: ours.

Refusals that the metrics share: a configuration or an input that a metric does not have, or one that is missing.

Source: ours; evaluate itself lets a missing column fail where its length is taken.

Folders of the routing metrics for `evaluate.load`; the functions behind them are those of this package.

Source: ours; each metric's card names the source of its formula.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe_cpt.routing.metrics import check_top_k_index


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


def refuse_unknown_inputs(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a line that names what was given and is not known, and what there is."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such input; there are {', '.join(known)}.")


def refuse_missing_inputs(batch: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise a line that names the columns of a batch that were not given."""
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: input missing; give all of {', '.join(needed)}.")


def refuse_unknown_configuration(config_name: str, known: Collection[str]) -> None:
    """Raise a line that names the configurations there are, unless config_name is one of them."""
    if config_name not in known:
        raise ValueError(f"config_name={config_name!r} is unknown: choose from {', '.join(known)}.")


_METRICS = Path(__file__).parent / "metrics"
ROUTING_IMBALANCE_FOLDER = str(_METRICS / "routing_imbalance")
ROUTER_SATURATION_FOLDER = str(_METRICS / "router_saturation")
VOCABULARY_SPECIALIZATION_FOLDER = str(_METRICS / "vocabulary_specialization")
EXPERT_COACTIVATION_FOLDER = str(_METRICS / "expert_coactivation")
