"""The settings that all trainers share, and those of a parent class that one does not read: refused with a remedy.

Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_moe_cpt.trainers.common.fault_tolerance import FaultToleranceArguments
from hf_moe_cpt.trainers.common.kernels import KernelArguments
from hf_moe_cpt.trainers.common.router_balance import RouterBalanceArguments
from hf_moe_cpt.trainers.common.updates import FreezeArguments, UpdateArguments


# Of TrainingArguments, for every trainer here: flags for scripts that choose what to do.
FLAGS_OF_SCRIPTS = {
    "do_train": "whoever starts a trainer trains",
    "do_predict": "generate with the model that is saved",
}
# Of TrainingArguments, for trainers whose data are in an order of their own and whose steps are counted.
OPTIONS_OF_EPOCHS = {
    "num_train_epochs": "max_steps ends the run",
    "train_sampling_strategy": "the data are in their order already",
    "length_column_name": "the data are in their order already",
    "auto_find_batch_size": "another batch would be another run, set per_device_train_batch_size",
}


@dataclass
class SharedArguments(
    KernelArguments, UpdateArguments, RouterBalanceArguments, FreezeArguments, FaultToleranceArguments
):
    """What every trainer here takes beside its parent's arguments. A mixin before `TrainingArguments`."""


def refuse_unread(settings: Any, parent: type, remedies: Mapping[str, str], part_of: str = "run") -> None:
    """Raise ValueError for the first field in `remedies` that has not the default that it has in `parent`.

    part_of: what the field is said to be no part of. Fields that this version of the parent does not have are passed.
    """
    fields = {field.name: field for field in dataclasses.fields(parent)}
    for name, remedy in remedies.items():
        if name not in fields:
            continue
        field, value = fields[name], getattr(settings, name)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if value != default and [value] != default:
            raise ValueError(f"{name}={value!r} is not part of this {part_of}: {remedy}.")
