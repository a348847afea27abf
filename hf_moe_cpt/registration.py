"""Tell transformers about the model type `cpt_moe` and about our kernels, at no cost for whoever does not use them.

Registering the plain way costs seconds: AutoConfig wants `transformers.models.auto`, the AutoModels want the model
classes and these want `transformers.modeling_utils`. So each half waits for its moment:

1. Registration happens when `transformers.models.auto` is imported: at once if it already is, otherwise right after
   (`_AfterImport`). A process that never asks for an Auto class, such as `hf-moe-cpt --help`, never pays.
2. AutoConfig gets the configuration class itself; the AutoModels get a `_ModelClassOnUse`, which imports the model
   file when a checkpoint is loaded and then puts the real classes in its place.

The kernels wait in the same way for the module whose table they enter (`register_kernels`).

Only public `register` methods and tables are used and no module of anybody else is changed. Source: ours.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from hf_moe_cpt.extras import is_installed


AUTO_CLASS_OF_MODEL = {
    "CptMoeModel": "AutoModel",
    "CptMoeForCausalLM": "AutoModelForCausalLM",
    "CptMoeForSequenceClassification": "AutoModelForSequenceClassification",
}
_CONFIGURATION_FILE = "hf_moe_cpt.modeling.configuration_cpt_moe"
_MODEL_FILE = "hf_moe_cpt.modeling.modeling_cpt_moe"


def register_model_type() -> None:
    """Make `AutoConfig`, `AutoModel` and their like know `cpt_moe`, whichever package is imported first."""
    _run_after_import("transformers.models.auto.configuration_auto", _register_configuration)
    _run_after_import("transformers.models.auto.modeling_auto", _register_models)


def register_kernels() -> None:
    """Offer our kernels under the names that others look up; importing the package has done so already.

    transformers' experts interface gets "hf_moe_cpt" and "hf_moe_cpt_low_memory". Liger-Kernel's table gets the model
    type `cpt_moe`. The routers of `cpt_moe` get the operator `torch.ops.hf_moe_cpt.sinkhorn_plan`, if Triton is
    installed and torch is built for a GPU.
    """
    _run_after_import("transformers.integrations.moe", _register_experts)
    _run_after_import("liger_kernel.transformers.monkey_patch", _register_with_liger)
    _run_after_import("hf_moe_cpt.modeling.modeling_cpt_moe", _register_router_operators)


def _register_experts() -> None:
    importlib.import_module("hf_moe_cpt.kernels.experts").register_experts_implementations()


def _register_with_liger() -> None:
    importlib.import_module("hf_moe_cpt.kernels.cross_entropy").register_with_liger()


def _register_router_operators() -> None:
    torch = sys.modules["torch"]
    if is_installed("triton") and (torch.version.cuda or torch.version.hip):
        importlib.import_module("hf_moe_cpt.kernels.sinkhorn")


def _register_configuration() -> None:
    auto = sys.modules["transformers.models.auto.configuration_auto"]
    config_class = importlib.import_module(_CONFIGURATION_FILE).CptMoeConfig
    auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models() -> None:
    """Register the model classes, or what loads them if their file has not been imported yet."""
    auto = sys.modules["transformers.models.auto.modeling_auto"]
    config_class = importlib.import_module(_CONFIGURATION_FILE).CptMoeConfig
    model_file = sys.modules.get(_MODEL_FILE)
    for model_name, auto_name in AUTO_CLASS_OF_MODEL.items():
        model_class = getattr(model_file, model_name, None) or _ModelClassOnUse(model_name, config_class)
        getattr(auto, auto_name).register(config_class, model_class, exist_ok=True)


class _ModelClassOnUse:
    """Holds a model class's place in an Auto mapping: the first attribute asked of it imports and registers all."""

    def __init__(self, model_name: str, config_class: type) -> None:
        self.__name__ = model_name
        self.config_class = config_class

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        model_class = getattr(importlib.import_module(_MODEL_FILE), self.__name__)
        _register_models()
        return getattr(model_class, name)


def _run_after_import(module_name: str, action: Callable[[], None]) -> None:
    """Call `action` once: now if the module has been imported, else as soon as it is."""
    if module_name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(module_name, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Watches for one import, hands it to the ordinary finders, adds a call after it and leaves `sys.meta_path`."""

    def __init__(self, module_name: str, action: Callable[[], None]) -> None:
        self.module_name = module_name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = execute_then_act
        return spec
