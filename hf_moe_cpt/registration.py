"""Tell transformers about the model type `cpt_moe` and about our kernels, at no cost for whoever does not use them.

Registering the plain way costs seconds: AutoConfig wants `transformers.models.auto`, the AutoModels want the model
classes and these want `transformers.modeling_utils`. So each part waits for its moment:

1. Registration happens when the module whose table it enters is imported: at once if it already is, otherwise right
   after (`_AfterImport`). A process that never asks for an Auto class, such as `hf-moe-cpt --help`, never pays.
2. AutoConfig gets the configuration class itself; the AutoModels get a `_ModelClassOnUse`, which imports the model
   file when a checkpoint is loaded and then puts the real classes in its place.

Only public `register` methods and tables are used and no module of anybody else is changed. Nothing is put on
`sys.meta_path`: a finder there would be asked for every module that is missing, in every step of a training.
Importing this file does all of it. Source: ours.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from types import ModuleType

from hf_moe_cpt.extras import is_installed


AUTO_CLASS_OF_MODEL = {
    "CptMoeModel": "AutoModel",
    "CptMoeForCausalLM": "AutoModelForCausalLM",
    "CptMoeForSequenceClassification": "AutoModelForSequenceClassification",
    "CptMoeForTokenClassification": "AutoModelForTokenClassification",
    "CptMoeForQuestionAnswering": "AutoModelForQuestionAnswering",
}
_CONFIGURATION_FILE = "hf_moe_cpt.modeling.configuration_cpt_moe"
_MODEL_FILE = "hf_moe_cpt.modeling.modeling_cpt_moe"


def register_kernels() -> None:
    """Offer our kernels under the names that others look up; importing the package has done so already.

    transformers' experts interface gets "hf_moe_cpt" and "hf_moe_cpt_low_memory", its interface of expert parallelism
    (5.23 or newer) "hf_moe_cpt". Liger-Kernel's table gets the model
    type `cpt_moe`. The routers of `cpt_moe` get the operator `torch.ops.hf_moe_cpt.sinkhorn_plan`, if Triton is
    installed and torch is built for a GPU.
    """
    interface = "hf_moe_cpt.kernels.experts_interface"  # registers itself
    _run_after_import("transformers.integrations.moe", partial(importlib.import_module, interface))
    exchange = "hf_moe_cpt.kernels.expert_parallel"  # and this
    _run_after_import("transformers.distributed.expert_parallel", partial(importlib.import_module, exchange))
    _run_after_import("liger_kernel.transformers.monkey_patch", _register_with_liger)
    _run_after_import(_MODEL_FILE, _register_router_operator)


def _register_with_liger() -> None:
    importlib.import_module("hf_moe_cpt.kernels.cross_entropy").register_with_liger()


def _register_router_operator() -> None:
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


def _run_after_import(module_name: str, action: Callable[[], object]) -> None:
    """Call `action` once: now if the module has been imported, else as soon as it is; never if it is not installed."""
    if module_name in sys.modules:
        action()
        return
    top, *inner, _ = module_name.split(".")
    if top == "hf_moe_cpt":  # its rooms need not lie in its own folder
        top, inner = f"{top}.{inner[0]}", inner[1:]
    package = importlib.util.find_spec(top)
    if package is not None and package.submodule_search_locations:
        folder = os.path.join(list(package.submodule_search_locations)[0], *inner)
        finder = sys.path_importer_cache.get(folder)
        if not isinstance(finder, _AfterImport):
            finder = sys.path_importer_cache[folder] = _AfterImport(folder)
        finder.actions[module_name] = action


class _AfterImport(FileFinder):
    """Python's finder of the modules in one folder, which adds a call after the import of some of them.

    It takes the place of the ordinary one in `sys.path_importer_cache`, where nothing but an import from that very
    folder asks it.
    """

    def __init__(self, folder: str) -> None:
        source, compiled = (SourceFileLoader, SOURCE_SUFFIXES), (SourcelessFileLoader, BYTECODE_SUFFIXES)
        super().__init__(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), source, compiled)
        self.actions: dict[str, Callable[[], object]] = {}

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary finder's answer."""
        spec = super().find_spec(fullname, target)
        if spec is None or spec.loader is None or fullname not in self.actions:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            self.actions.pop(fullname, lambda: None)()

        spec.loader.exec_module = execute_then_act
        return spec


_run_after_import("transformers.models.auto.configuration_auto", _register_configuration)
_run_after_import("transformers.models.auto.modeling_auto", _register_models)
register_kernels()
