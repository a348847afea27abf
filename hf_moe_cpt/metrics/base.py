"""The frame of the metrics for the library evaluate: configurations, refusals, descriptions, and inputs they share.

evaluate copies the single file of a metric into its cache and takes the first metric class in it: a metric therefore
imports this module, not the class. Source: ours; evaluate itself lets a missing column fail where its length is taken.
"""

import inspect
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch
from evaluate.naming import camelcase_to_snakecase
from torch import Tensor

from hf_moe_cpt.routing.metrics import check_top_k_index


EASYEDIT = """\
@article{wang2023easyedit,
  title = {{EasyEdit}: An Easy-to-use Knowledge Editing Framework for Large Language Models},
  journal = {arXiv preprint arXiv:2308.07269},
  year = {2023}
}
"""
OLMOE = """\
@article{muennighoff2024olmoe,
  title = {OLMoE: Open Mixture-of-Experts Language Models},
  author = {Muennighoff, Niklas and others},
  journal = {arXiv preprint arXiv:2409.02060},
  year = {2024}
}
"""
CONTINUAL_MOE = """\
@article{therien2025continual,
  title = {Continual Pre-training of MoEs: How robust is your router?},
  author = {Th{\\'e}rien, Benjamin and others},
  journal = {arXiv preprint arXiv:2503.05029},
  year = {2025}
}
"""


_INPUTS = """
Args:
    {args}
Returns:
    {returns}
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.metrics import metric_folder
    >>> metric = evaluate.load(metric_folder("{name}"))
    {example}
"""
_BOOTSTRAP = """
    groups (list of str, optional): what each row is about; rows of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
"""


class Metric(evaluate.Metric):
    """A metric says what it is in these attributes; its method `score` takes the inputs and options that were given.

    The docstring of the class is its description. COLUMNS: of each configuration the inputs with a value a row, and
    their type, in a list for several values a row. OPTIONS: other inputs, by default those of the bootstrap. ARGS,
    RETURNS, EXAMPLE: parts of its inputs_description, which an interpreter can run.
    """

    CITATION: ClassVar[str]
    URLS: ClassVar[tuple[str, ...]]
    COLUMNS: ClassVar[Mapping[str, Mapping[str, str | list[str]]]]
    OPTIONS: ClassVar[tuple[str, ...]] = ("groups", "confidence", "resamples", "seed")
    ARGS: ClassVar[str]
    RETURNS: ClassVar[str]
    EXAMPLE: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in self.COLUMNS:
            raise ValueError(f"config_name={self.config_name!r} is unknown: choose from {', '.join(self.COLUMNS)}.")
        args = self.ARGS.strip() + (_BOOTSTRAP.rstrip() if "resamples" in self.OPTIONS else "")
        name = camelcase_to_snakecase(type(self).__name__)
        parts = {"returns": self.RETURNS.strip(), "example": self.EXAMPLE.strip()}
        return evaluate.MetricInfo(
            description=inspect.cleandoc(type(self).__doc__),
            citation=self.CITATION,
            inputs_description=_INPUTS.format(name=name, args=args, **parts),
            features=datasets.Features({column: _feature(kind) for column, kind in self._columns().items()}),
            reference_urls=list(self.URLS),
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together. Raises ValueError for one that is missing."""
        missing = [name for name in self._columns() if batch.get(name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: input missing; give all of {', '.join(self._columns())}.")
        super().add_batch(**batch)

    def _compute(self, **given: Any) -> dict[str, Any]:
        for config_name, columns in self.COLUMNS.items():
            others = [name for name in given if name in columns and name not in self._columns()]
            if others:
                raise ValueError(
                    f"{', '.join(others)} need their configuration: evaluate.load(..., config_name={config_name!r})."
                )
        refuse_unknown_inputs(given, (*self._columns(), *self.OPTIONS))
        return self.score(**given)

    def _columns(self) -> Mapping[str, str | list[str]]:
        return self.COLUMNS[self.config_name]


def _feature(kind: str | list[str]) -> Any:
    return datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)


def refuse_unknown_inputs(given: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError in a line that names what was given and is not known, and what there is."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such input; there are {', '.join(known)}.")


def groups_of(groups: Sequence[Hashable] | None, rows: np.ndarray, num_rows: int) -> list[Hashable] | None:
    """The groups of some of num_rows rows, None without groups. Raises ValueError for another number of groups."""
    if groups is None:
        return None
    if len(groups) != num_rows:
        raise ValueError(f"groups has {len(groups)} entries for {num_rows} rows: name the group of each row.")
    return [groups[row] for row in rows]


def experts_of_rows(rows: Sequence[Sequence[int]], num_experts: int | None) -> tuple[Tensor, int]:
    """The input top_k_index as (T, K) int64, and E. Raises ValueError if E was not given, and as `index_of_rows`."""
    if num_experts is None or num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be given: experts that no token visits count too.")
    return index_of_rows("top_k_index", rows, num_experts), num_experts


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
