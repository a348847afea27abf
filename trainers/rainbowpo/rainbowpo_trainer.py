"""The trainer of RainbowPO: TRL's DPOTrainer with another loss, on the forward passes that TRL makes anyway.

B pairs, S tokens of the padded sequences, H the reference's entropy of a pair. Rows of a batch are the chosen
sequences, then the rejected ones. Source: Zhao et al. 2025 (RainbowPO, arXiv 2410.04203); TRL 1.16.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from hf_moe_cpt.trainers.instruments.published_run import PublishedRun
from hf_moe_cpt.trainers.instruments.survives_faults import SurvivesFaults
from hf_moe_cpt.trainers.rainbowpo.calibration import add_components, read_scale, training_entropies, write_scale
from hf_moe_cpt.trainers.rainbowpo.completions import completion_lengths, completion_sums, mask_and_labels
from hf_moe_cpt.trainers.rainbowpo.objective import (
    Pair,
    dispersion_scale_of,
    length_advantage,
    mallows_phi,
    normalized_entropy,
    preference_terms,
    score_advantage,
)
from hf_moe_cpt.trainers.rainbowpo.preference_data import (
    AnyDataset,
    CollatorWithScores,
    check_pairs,
    drop_empty_pairs,
    without_text_prompt,
)
from hf_moe_cpt.trainers.rainbowpo.preference_meter import PreferenceMeter, pair_statistics, token_statistics
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.reference_head import add_entropy_head, in_evaluation
from hf_moe_cpt.trainers.rainbowpo.request_checks import check_end_of_text, check_request
from hf_moe_cpt.trainers.rainbowpo.router_balance import balance_of_batch, recorded_router_logits
from hf_moe_cpt.trainers.rainbowpo.runaway_watch import RunawayWatch


logger = logging.getLogger(__name__)

NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "scores"}
SWITCHES = (
    "beta",
    "mixing_alpha",
    "mix_home_advantage",
    "length_normalization",
    "link",
    "label_smoothing",
    "sft_weight",
)
_NO_REFERENCE = object()  # what the parent is given so that it neither loads nor copies a reference


class RainbowPOTrainer(SurvivesFaults, PublishedRun, DPOTrainer):
    """Preference optimisation of any causal LM, dense or MoE, with the seven components of RainbowPO as switches.

    Data, adapters, references (a model, the adapter switched off, or precomputed columns) and saving are the parent's.
    No reference is loaded where neither its log-probabilities nor its entropies are used. Logged under TRL's names,
    and besides: `phi/mean|min|max`, `ref_entropy` (H), `margin/effective`, `logps_norm/*`, `loss/*` (the parts of the
    loss, as they enter it), `length/*`. `rewards/*` are in the units of the objective.

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        ref_model: the reference; by default the model as it starts.
        args: a `RainbowPOConfig`.
        train_dataset, eval_dataset: preference pairs as for `trl.DPOTrainer`; with `home_advantage_from="score"` also
            the two columns of scores.
        processing_class: the tokenizer, which must have an end-of-text token; by default the model's.
        kwargs: the parent's other arguments, such as `peft_config` and `callbacks`.
    """

    run_method = "rainbowpo"
    _tag_names = ["trl", "hf_moe_cpt", "rainbowpo"]
    _name = "RainbowPO"
    _paper = {
        "title": "RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization",
        "id": "2410.04203",
        "citation": "@inproceedings{zhao2025rainbowpo,\n"
        "    title     = {{RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization}},\n"
        "    author    = {Zhao, Hanyang and others},\n"
        "    booktitle = {International Conference on Learning Representations},\n    year      = 2025,\n}",
    }

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: PreTrainedModel | None = None,
        args: RainbowPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RainbowPOConfig(f"{name.split('/')[-1]}-RainbowPO")
        check_request(model, ref_model, args, train_dataset, processing_class, kwargs)
        scale = args.dispersion_scale if args.needs_reference_entropy else None
        self.dispersion_scale = None if scale == "auto" else scale
        self.meters, self.runaway_watch = {"train": PreferenceMeter(), "eval": PreferenceMeter()}, RunawayWatch()
        self._tokens_seen: Tensor | int = 0
        super().__init__(
            model,
            ref_model if args.needs_reference else _NO_REFERENCE,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )
        if args.home_advantage_from == "score":
            columns = (args.chosen_score_column, args.rejected_score_column)
            self.data_collator = CollatorWithScores(self.data_collator, columns)

    # ---- data ----

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: Any, args: RainbowPOConfig, dataset_name: str
    ) -> AnyDataset:
        if self._is_vlm:
            raise ValueError("RainbowPOTrainer takes language models, and this one has a processor for images.")
        check_end_of_text(self._tokenizer)
        check_pairs(dataset, args, dataset_name)
        given = len(dataset) if isinstance(dataset, Dataset) else None
        dataset = super()._prepare_dataset(without_text_prompt(dataset), processing_class, args, dataset_name)
        max_length = args.max_length if args.truncation_mode == "keep_start" else None
        return drop_empty_pairs(dataset, self._tokenizer, max_length, dataset_name, given)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.args.chosen_score_column, self.args.rejected_score_column]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    # ---- the reference ----

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; None where there is none, or where it is the policy without its adapter."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        # The parent assigns the bare model before it adds its own head, and again once it is wrapped.
        if isinstance(model, PreTrainedModel) and self.args.needs_reference_entropy:
            add_entropy_head(model)
        self._ref_model = None if model is _NO_REFERENCE else model

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected, (B, 2) each: the reference's summed log-probability, and H of the pair.

        The parent caches both in the columns of its own log-probabilities; H is 0 where it is not used.
        """
        head = "fused_lm_head" if self.ref_model is None or not self.args.needs_reference_entropy else "with_entropy"
        mask, labels = mask_and_labels(inputs)
        with torch.no_grad(), self._policy_as_reference(), self.accelerator.autocast():
            outputs = model(**self._model_inputs(inputs, with_router=False), labels=labels, **{head: True})
        logps = completion_sums(outputs.log_probs, mask)
        entropy = torch.zeros_like(logps.chosen)
        if self.args.needs_reference_entropy:
            vocabulary_size = self.model.config.get_text_config().vocab_size
            entropy = normalized_entropy(
                completion_sums(outputs.entropy, mask), completion_lengths(mask), vocabulary_size
            )
        return torch.stack([logps.chosen, entropy], dim=1), torch.stack([logps.rejected, entropy], dim=1)

    @contextlib.contextmanager
    def _policy_as_reference(self) -> Iterator[None]:
        """Without a reference model the policy answers: as in evaluation, and without its adapter if it has one."""
        if self.ref_model is not None:
            yield
            return
        policy = self.accelerator.unwrap_model(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if is_peft_model(policy):
                stack.enter_context(use_adapter(policy, "ref" if "ref" in policy.peft_config else None))
            stack.enter_context(in_evaluation(self.model))  # a Sinkhorn router balances the batch in training
            yield

    def _precompute_ref_logps(self, dataset: AnyDataset, name: str, batch_size: int) -> AnyDataset:
        if not self._precompute_model_hash.startswith(self._name):  # the parent's cache holds other columns
            cut = (self.args.max_length, self.args.truncation_mode, self.args.needs_reference_entropy)
            self._precompute_model_hash = self._name + Hasher.hash((self._precompute_model_hash, cut))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _reference(self, inputs: dict[str, Tensor]) -> tuple[Pair | None, Tensor | None]:
        """The reference's log-probabilities and H (B,) of a batch; None for what there is not."""
        if not self.args.needs_reference:
            return None, None
        if self.precompute_ref_logps:
            columns = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            columns = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return Pair(*(column[:, 0] for column in columns)), columns[0][:, 1]

    # ---- the loss ----

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mask, labels = mask_and_labels(inputs)
        with recorded_router_logits(self.accelerator.unwrap_model(self.model)) as router_logits:
            outputs = model(**self._model_inputs(inputs, self.aux_loss_enabled), labels=labels, fused_lm_head=True)
        logps, lengths = completion_sums(outputs.log_probs, mask), completion_lengths(mask)
        ref_logps, entropy = self._reference(inputs)
        phi = mallows_phi(entropy, self.dispersion_scale) if self.args.needs_reference_entropy else 1.0
        switches = {name: getattr(self.args, name) for name in SWITCHES}
        terms = preference_terms(logps, lengths, ref_logps, self._home_advantage(inputs, lengths), phi, **switches)
        loss = terms.loss.mean()

        statistics = token_statistics(outputs, mask)
        statistics |= pair_statistics(terms, logps, ref_logps, lengths, self.args.beta, self.args.length_normalization)
        if self.args.sft_weight:
            statistics["loss/sft"] = (self.args.sft_weight * terms.sft.sum(), len(terms.sft))
        if self.aux_loss_enabled and isinstance(outputs.aux_loss, Tensor):
            aux_loss = balance_of_batch(self.model, outputs.aux_loss, router_logits, inputs["attention_mask"])
            penalty = (self.router_aux_loss_coef if self.model.training else 0.0) * aux_loss
            loss = loss + penalty.to(loss.device)  # never in the evaluation loss
            statistics |= {"aux_loss": (aux_loss, 1), "loss/aux": (penalty, 1)}
        meter = self.meters["train" if self.model.training else "eval"]
        if self.args.needs_reference_entropy:
            statistics |= {"phi/mean": (phi.sum(), len(phi)), "ref_entropy": (entropy.sum(), len(entropy))}
            meter.add_range("phi", phi)
        meter.add(statistics)
        if self.model.training:
            self._tokens_seen = self._tokens_seen + inputs["attention_mask"].sum()
        return (loss, outputs) if return_outputs else loss

    def _model_inputs(self, inputs: dict[str, Tensor], with_router: bool) -> dict[str, Any]:
        kept = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL} | {"use_cache": False}
        if hasattr(self.model.config.get_text_config(), "output_router_logits"):
            kept["output_router_logits"] = with_router
        return kept

    def _home_advantage(self, inputs: dict[str, Tensor], lengths: Pair) -> Tensor | float:
        if self.args.home_advantage_from == "length":
            return length_advantage(lengths, self.args.home_advantage)
        if self.args.home_advantage_from == "score":
            pair = Pair(*inputs["scores"].unbind(1))
            return score_advantage(pair, self.args.home_advantage, self.args.score_transform)
        return self.args.home_advantage

    # ---- calibration, running, reporting ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`."""
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.dispersion_scale is None and checkpoint is not None:
            self.dispersion_scale = read_scale(checkpoint)
        self._calibrate()
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; `dispersion_scale="auto"` is calibrated first if it has not been."""
        self._calibrate()
        return super().evaluate(*args, **kwargs)

    def _calibrate(self) -> None:
        if self.dispersion_scale is None and self.args.needs_reference_entropy:
            self.dispersion_scale = dispersion_scale_of(training_entropies(self))
            logger.info("dispersion_scale=%.4g gives phi the mean 1 on the training pairs.", self.dispersion_scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meters saw since the last log, and warn of a policy that runs away."""
        mode = "train" if self.model.training else "eval"
        metrics = self.meters[mode].pop()
        if mode == "train" and metrics:
            metrics["num_tokens"] = self.accelerator.reduce(self._tokens_seen).item() // self._tp_size
            self.runaway_watch.look(metrics)
        if mode == "eval":
            prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
            metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
        logs.update(metrics)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        write_scale(output_dir or self.args.output_dir, self.dispersion_scale)

    def run_details(self) -> dict[str, str]:
        """The row of the table of methods that the objective is, for training_run.json and the card."""
        return {"components": str(self.args.components())}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card with the components of the objective and the scale of phi, also before a model is saved."""
        super().create_model_card(*args, **kwargs)
        add_components(self.args, self.dispersion_scale)
