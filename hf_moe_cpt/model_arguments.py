"""Which model a trainer of the command line gets, how it is loaded, and what of it is trained.

The names are those of TRL's `ModelConfig`; neither TRL nor peft is needed to read them. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.extras import require
from hf_moe_cpt.reading import read_config
from hf_moe_cpt.routing.hooks import layers_to_watch, moe_layers
from hf_moe_cpt.trainers.common.run_folder import check_output_dir
from hf_moe_cpt.trainers.common.updates import quantise_experts


Training = TypeVar("Training", bound=TrainingArguments)
DTYPES = ("auto", "bfloat16", "float16", "float32")
EXPERTS = "experts"  # among the targets of an adapter: the fused weights of all routed experts
ALL_LINEAR = "all-linear"  # peft's word for the layers, to which we add the experts
LORA_DROPOUT = 0.05
OF_ADAPTERS = ("lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb_")  # how names of their settings begin


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and whether an adapter is trained."""

    model_name_or_path: str | None = HfArg(default=None, help="Hub id or folder of the model to train.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit on the Hub.")
    dtype: str | None = HfArg(
        default=None,
        help="Type of the weights; auto: as saved; unset: float32, or bfloat16 on a GPU that this does not fit.",
        metadata={"choices": list(DTYPES)},
    )
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    experts_implementation: str | None = HfArg(
        default=None, help="Of a mixture of experts: eager, grouped_mm, hf_moe_cpt, ..."
    )
    # --- the adapter ---
    use_peft: bool = HfArg(default=False, help="Train a LoRA adapter instead of the whole model.")
    lora_r: int = HfArg(
        default=16, metadata={"range": "[1, 65536]"}, help="Rank of the adapter; of fused experts, of each expert."
    )
    lora_alpha: int = HfArg(default=32, metadata={"range": "[1, inf)"}, help="Its scale is lora_alpha / lora_r.")
    lora_dropout: float | None = HfArg(
        default=None,
        metadata={"range": "[0, 1)"},
        help=f"Dropout of the adapter; unset: {LORA_DROPOUT}, and 0 where experts are adapted.",
    )
    lora_target_modules: list[str] | None = HfArg(
        default=None,
        help=f"Names of the layers that are adapted, {EXPERTS} for all routed experts, {ALL_LINEAR} for everything; "
        "unset: peft's choice for the model.",
    )
    lora_target_parameters: list[str] | None = HfArg(
        default=None, help=f"Names of weights that are adapted, such as mlp.experts.down_proj, or {EXPERTS}."
    )
    lora_modules_to_save: list[str] | None = HfArg(
        default=None, help="Names of layers that are trained whole beside the adapter."
    )
    use_rslora: bool = HfArg(default=False, help="Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = HfArg(default=False, help="Decompose weights into magnitude and direction; not for experts.")
    # --- quantised weights, under an adapter ---
    load_in_4bit: bool = HfArg(default=False, help="Quantise the weights to 4 bit.")
    load_in_8bit: bool = HfArg(default=False, help="Quantise the weights to 8 bit.")
    bnb_4bit_quant_type: str = HfArg(default="nf4", help="fp4 or nf4.", metadata={"choices": ["fp4", "nf4"]})
    bnb_4bit_quant_storage: str | None = HfArg(default=None, help="Type that holds the 4 bit weights.")
    use_bnb_nested_quant: bool = HfArg(default=False, help="Quantise the constants of 4 bit weights too.")

    def check(self, training: TrainingArguments, besides: tuple[str, ...] = ()) -> None:
        """Raise ValueError or ImportError for what cannot work, before anything is loaded.

        besides: what may lie in the output folder of a run that starts anew.
        """
        if self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: name the model to train, a Hub id or a folder.")
        self.check_adapter()
        check_output_dir(training, besides)

    def check_adapter(self) -> None:
        """Raise ValueError or ImportError for an adapter that cannot be, and for settings of one that there is not."""
        if self.use_peft:
            require("peft", needed_by="--use_peft")
        settings = (field for field in fields(ModelArguments) if field.name.startswith(OF_ADAPTERS))
        given = [field.name for field in settings if getattr(self, field.name) != field.default]
        if given and not self.use_peft:
            raise ValueError(f"--{given[0]} is about an adapter, and none is trained: add --use_peft or leave it out.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit: weights have one type, choose one of them.")

    def quantization(self) -> BitsAndBytesConfig | None:
        """How weights are quantised while they are loaded, None if they are not."""
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=None if self.dtype == "auto" else self.dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
        )

    def given_to(self, training: Training, **more: Any) -> Training:
        """`training` with how the model is loaded; its `model_init_kwargs` win, and None leaves an option out."""
        training.model_init_kwargs = self.loading(training.model_init_kwargs, **more)
        return training

    def loading(self, wins: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        """Arguments of `from_pretrained`; None leaves an option out, and what `wins` holds is taken over ours."""
        options = {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "experts_implementation": self.experts_implementation,
            "quantization_config": self.quantization(),
            **more,
        }
        return {name: value for name, value in options.items() if value is not None} | (wins or {})

    def peft_config(self, model: nn.Module | None = None, trust_remote_code: bool = False) -> Any:
        """The adapter as peft's LoraConfig, None without --use_peft.

        model: where the names of its experts are read; None: from the named model's configuration, without weights.
        Raises ValueError where experts are to be adapted and there are none, and for what adapters of experts lack.
        """
        if not self.use_peft:
            return None
        modules, parameters = self.lora_target_modules, list(self.lora_target_parameters or ())
        is_asked = EXPERTS in (*(modules or ()), *parameters)
        if is_asked or ALL_LINEAR in (modules or ()):
            model = self._without_weights(trust_remote_code) if model is None else model
            if is_asked or moe_layers(model):
                parameters = [name for name in parameters if name != EXPERTS] + expert_weights(model)
        if parameters and (self.lora_dropout or self.use_dora):
            raise ValueError("Adapters of experts have neither --lora_dropout nor --use_dora: leave them out.")
        if modules is not None:
            modules = ALL_LINEAR if ALL_LINEAR in modules else [name for name in modules if name != EXPERTS]
        default_dropout = 0.0 if parameters else LORA_DROPOUT
        return require("peft", needed_by="--use_peft").LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=default_dropout if self.lora_dropout is None else self.lora_dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model with its adapter, experts quantised beneath it where that was asked for; itself without."""
        adapter = self.peft_config(model)
        if adapter is not None:
            model = require("peft", needed_by="--use_peft").get_peft_model(model, adapter)
        quantise_experts(model)
        return model

    def _without_weights(self, trust_remote_code: bool) -> nn.Module:
        options = {"trust_remote_code": trust_remote_code}
        config = read_config(self.model_name_or_path, revision=self.model_revision, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)


def expert_weights(model: nn.Module) -> list[str]:
    """Ends of the names of all routed experts' matrices, as peft's target_parameters; ValueError for a dense model."""
    return sorted(
        {
            ".".join([*layer.name.split(".")[-2:], name])
            for layer in layers_to_watch(model)
            for name, weight in layer.experts.named_parameters()
            if weight.ndim == 3
        }
    )
