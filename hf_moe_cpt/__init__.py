"""Continual pre-training, alignment and surgery of mixture-of-experts language models on top of Hugging Face.

Importing the package tells `transformers` about the model type `cpt_moe` and the experts implementation "hf_moe_cpt"
(see `hf_moe_cpt.registration`) and loads nothing else: every public name below is imported when first asked for.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hf_moe_cpt.extras import require


if TYPE_CHECKING:
    from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
    from hf_moe_cpt.modeling.modeling_cpt_moe import (
        CptMoeForCausalLM,
        CptMoeForQuestionAnswering,
        CptMoeForSequenceClassification,
        CptMoeForTokenClassification,
        CptMoeModel,
    )
    from hf_moe_cpt.optim.adamw import StochasticAdamW
    from hf_moe_cpt.trainers.common.router_monitor import RouterMonitorCallback
    from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
    from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer
    from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
    from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "CPTConfig",
    "CPTTrainer",
    "CptMoeConfig",
    "CptMoeForCausalLM",
    "CptMoeForQuestionAnswering",
    "CptMoeForSequenceClassification",
    "CptMoeForTokenClassification",
    "CptMoeModel",
    "RainbowPOConfig",
    "RainbowPOTrainer",
    "RouterMonitorCallback",
    "StochasticAdamW",
    "SurgeryConfig",
    "SurgeryTrainer",
    "register_kernels",
]

_PACKAGE_OF_EXTRA = {"RainbowPOConfig": "trl", "RainbowPOTrainer": "trl"}

# In a checkout the rooms modeling/, trainers/, scripts/ and hub_cards/ lie beside this folder instead of inside it.
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_CHECKOUT, "setup.cfg")) and os.path.isdir(os.path.join(_CHECKOUT, "modeling")):
    __path__.append(_CHECKOUT)


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package. names: for each module those that it is the home of.

    A name that was asked for is a plain attribute afterwards; an unknown one raises AttributeError.
    """
    home_of_name = {name: module for module, its_names in names.items() for name in its_names}

    def get(name: str) -> object:
        if name not in home_of_name:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home_of_name[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home_of_name})


_import, __dir__ = lazy_names(
    __name__,
    {
        "hf_moe_cpt.trainers.cpt.cpt_config": ("CPTConfig",),
        "hf_moe_cpt.trainers.cpt.cpt_trainer": ("CPTTrainer",),
        "hf_moe_cpt.modeling.configuration_cpt_moe": ("CptMoeConfig",),
        "hf_moe_cpt.modeling.modeling_cpt_moe": (
            "CptMoeForCausalLM",
            "CptMoeForQuestionAnswering",
            "CptMoeForSequenceClassification",
            "CptMoeForTokenClassification",
            "CptMoeModel",
        ),
        "hf_moe_cpt.optim.adamw": ("StochasticAdamW",),
        "hf_moe_cpt.trainers.rainbowpo.rainbowpo_config": ("RainbowPOConfig",),
        "hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer": ("RainbowPOTrainer",),
        "hf_moe_cpt.trainers.common.router_monitor": ("RouterMonitorCallback",),
        "hf_moe_cpt.trainers.surgery.surgery_config": ("SurgeryConfig",),
        "hf_moe_cpt.trainers.surgery.surgery_trainer": ("SurgeryTrainer",),
    },
)


def __getattr__(name: str) -> object:
    """A public name, imported on first use; what needs a package that is not installed says so."""
    if name in _PACKAGE_OF_EXTRA:
        require(_PACKAGE_OF_EXTRA[name], needed_by=name)
    return _import(name)


from hf_moe_cpt.registration import register_kernels  # noqa: E402  registers everything, once rooms can be found
