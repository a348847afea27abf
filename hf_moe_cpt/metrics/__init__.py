"""The metrics that `evaluate` loads, a folder each, of routing, preferences and surgeries; and the frame of them all.

The frame is configurations, refusals, what cards say, shared inputs. evaluate copies the single file of a metric into
its cache and takes the first metric class in it: a metric therefore imports this package, not the class. Source: ours;
evaluate itself lets a missing column fail where its length is taken.
"""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch
from evaluate.naming import camelcase_to_snakecase
from torch import Tensor

from hf_moe_cpt.routing.metrics import check_top_k_index


def metric_folder(name: str) -> str:
    """What `evaluate.load` takes for the metric `name`, such as "router_saturation"; its card lies there.

    Raises ValueError for an unknown name.
    """
    known = {path.parent.name: str(path.parent) for path in Path(__file__).parent.glob("*/README.md")}
    if name not in known:
        raise ValueError(f"{name!r} is no metric: choose from {', '.join(sorted(known))}.")
    return known[name]


class Metric(evaluate.Metric):
    """A metric says in these attributes what it takes; its method `score` gets the inputs and options that were given.

    COLUMNS: of each configuration the inputs with a value a row, and their type, in a list for several values a row.
    OPTIONS: other inputs, by default those of the bootstrap. Everything else about it is in its card, README.md.
    """

    COLUMNS: ClassVar[Mapping[str, Mapping[str, str | list[str]]]]
    OPTIONS: ClassVar[tuple[str, ...]] = ("groups", "confidence", "resamples", "seed")

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in self.COLUMNS:
            raise ValueError(f"config_name={self.config_name!r} is unknown: choose from {', '.join(self.COLUMNS)}.")
        folder = Path(metric_folder(camelcase_to_snakecase(type(self).__name__)))
        card = (folder / "README.md").read_text(encoding="utf-8")
        usage, sources = (card.partition(f"## {heading}")[2] for heading in ("How to use", "Citation"))
        return evaluate.MetricInfo(
            description=re.search("^description: (.*)$", card, re.MULTILINE)[1],
            citation=re.search("```bibtex\n(.*?)```", sources, re.DOTALL)[1],
            inputs_description=re.sub("^```.*$", "", usage.partition("\n## ")[0], flags=re.MULTILINE),
            features=datasets.Features({column: _feature(kind) for column, kind in self._columns().items()}),
            reference_urls=re.findall(r"\((https://[^)]+)\)", sources),
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
