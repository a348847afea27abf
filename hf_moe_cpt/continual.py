"""What `hf-moe-cpt cpt`, `tokenize` and `rewarm` start from: a model, named or of a preset, and data.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import ParallelArguments, given_values, json_object, parallel_options
from hf_moe_cpt.extras import require
from hf_moe_cpt.hub.convert import TARGETS, check_servable
from hf_moe_cpt.model_arguments import ModelArguments
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.planning.plan import ASKED, fit_to_gpu
from hf_moe_cpt.reading import read_config, read_model, read_tokenizer, refuse_adapter
from hf_moe_cpt.trainers.common.run_folder import check_output_dir
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import DataArguments, extend_vocabulary


@dataclass
class StartArguments(ModelArguments):
    """What training starts from: --model_name_or_path, or"""

    preset: str | None = HfArg(default=None, help="Pre-train this preset from scratch, e.g. pb-granular-2b.")
    preset_overrides: str | None = HfArg(
        default=None, help="Configuration fields to change in the preset, as JSON: '{\"num_hidden_layers\": 4}'."
    )
    tokenizer_name_or_path: str | None = HfArg(
        default=None, help="Tokenizer, if not the model's; needed with --preset."
    )
    trust_remote_code: bool = HfArg(default=False, help="Run model code that lies in the Hub repository.")
    serve_as: str | None = HfArg(
        default=None,
        metadata={"choices": [name for name in TARGETS if name != "cpt_moe"]},
        help="Refuse to train a model of cpt_moe that could not be converted to this family and served as it.",
    )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that is named, or the model's."""
        named = self.tokenizer_name_or_path or self.model_name_or_path
        if named is None:
            raise ValueError("no tokenizer: give --model_name_or_path, or --tokenizer_name_or_path.")
        return read_tokenizer(named, revision=self.model_revision, trust_remote_code=self.trust_remote_code)

    def preset_config(self, **fields: Any) -> CptMoeConfig | None:
        """The preset's configuration with these fields, over which --preset_overrides wins; None without --preset."""
        overrides = json_object("--preset_overrides", self.preset_overrides)
        return None if self.preset is None else CptMoeConfig.from_preset(self.preset, **{**fields, **overrides})


START = (StartArguments, DataArguments, CPTConfig, ParallelArguments)


def load_model(
    args: StartArguments, tokenizer: PreTrainedTokenizerBase, training: CPTConfig, parallel: dict[str, Any]
) -> nn.Module:
    """The named model, cut while it is read, or one of the preset with the tokenizer's vocabulary; or an adapter."""
    if args.model_name_or_path is not None:
        options = args.loading(training.model_init_kwargs, trust_remote_code=args.trust_remote_code, **parallel)
        model = read_model(AutoModelForCausalLM, args.model_name_or_path, **options)
        if training.vocabulary == "extend":
            extend_vocabulary(model, tokenizer, read_tokenizer(args.model_name_or_path, revision=args.model_revision))
    else:
        fitting = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = args.preset_config(vocab_size=len(tokenizer), **fitting)
        set_seed(training.seed)
        names = ("attn_implementation", "experts_implementation", "dtype")
        options = {name: value for name in names if (value := getattr(args, name)) not in (None, "auto")}
        model = AutoModelForCausalLM.from_config(config, **options)
    return args.adapted(model)


def check_arguments(model: StartArguments, training: CPTConfig, parallel: dict[str, Any]) -> None:
    """Refuse what cannot work before anything is loaded."""
    if parallel and model.preset is not None:
        raise ValueError(
            f"--preset {model.preset} makes a whole model on every rank: save it first, "
            "AutoModelForCausalLM.from_config(config).save_pretrained(folder), and name it with --model_name_or_path."
        )
    if (model.model_name_or_path is None) == (model.preset is None):
        given = f"--model_name_or_path ({model.model_name_or_path}) and --preset ({model.preset})"
        raise ValueError(f"Give one of {given}: the first continues a model, the second starts one.")
    if model.model_name_or_path is not None:
        refuse_adapter(model.model_name_or_path)
    if model.preset is not None and (training.model_init_kwargs or model.quantization()):
        raise ValueError("--model_init_kwargs and --load_in_... read a model, and --preset makes one: leave them out.")
    if model.serve_as is not None:
        options = {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
        check_servable(model.preset_config() or read_config(model.model_name_or_path, **options), model.serve_as)
    model.check_adapter()
    if training.use_liger_kernel:
        require("liger_kernel", needed_by="--use_liger_kernel")
    if model.preset is not None and model.tokenizer_name_or_path is None:
        raise ValueError("--preset needs --tokenizer_name_or_path: a fresh model has no tokenizer of its own.")
    check_output_dir(training)


def fitted(
    argv: Sequence[str] | None, model: StartArguments, training: CPTConfig, parallel_args: ParallelArguments
) -> tuple[CPTConfig, dict[str, Any]]:
    """The settings of a run after all that can be refused or decided before weights are read, and how ranks share."""
    parallel = parallel_options(parallel_args, training)
    check_arguments(model, training, parallel)
    setup = {"batch_size": training.per_device_train_batch_size, "sequence_length": training.max_length}
    training = fit_to_gpu(
        model,
        training,
        given_values(argv, *ASKED),
        setup,
        parallel,
        config=model.preset_config(),
        trust_remote_code=model.trust_remote_code,
    )
    return training, parallel
