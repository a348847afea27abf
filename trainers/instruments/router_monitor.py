"""Watch the routers of any mixture of experts while any Trainer trains it: balance of experts, drift of routers.

Works with our trainers, transformers' and TRL's, with accumulation, several ranks, adapters and checkpointing. Every
forward pass with gradient counts, once: passes of an evaluation, of a reference model, of a generation and of
recomputation do not. Counts stay on the device until the trainer logs.

Letters: L MoE layers, E experts, K experts per token, B sequences, S tokens of the longest of them.
Source: MRI and router saturation are metrics of paper 1 (arXiv 2503.05029); the callback is ours.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hf_moe_cpt.analysis.routing_tap import layers_to_watch
from hf_moe_cpt.trainers.instruments.expert_load import ExpertLoadMeter
from hf_moe_cpt.trainers.instruments.routing_probe import RoutingProbe


logger = logging.getLogger(__name__)

PROBE_FILE = "router_probe.safetensors"
Batch = Mapping[str, Tensor]


class RouterMonitorCallback(TrainerCallback):
    """Adds to the training log, per layer and as the mean over layers:

    `mri` (share of the tokens that visit the busiest expert, in [K/E, 1]), `mri_normalized` (x E/K, 1 is perfect
    balance), `load_entropy` (over log E, 1 is perfect balance), each as `name` and `name/layer_00`, means over the
    optimizer steps since the last log; with a probe also `router_saturation` (share of a token's experts that the
    starting model chose too, 1 is unchanged).

    With `callbacks=[...]` or `add_callback` the values reach log_history, the console and callbacks that come later;
    W&B, TensorBoard and other reporters come first in a Trainer's list: `attach` puts the monitor before them.

    Args:
        every: optimizer steps between two entries, at which the trainer is made to log; None: whenever it logs.
        per_layer: whether layers are logged one by one beside the mean.
        probe: batches of input_ids and attention_mask (B, S) on which saturation is measured.
        probe_every: optimizer steps between two measurements of saturation at least; a measurement costs one forward
            pass over the probe.
    """

    def __init__(
        self,
        every: int | None = None,
        per_layer: bool = True,
        probe: Batch | Iterable[Batch] | None = None,
        probe_every: int = 1,
    ) -> None:
        for name, value in (("every", every), ("probe_every", probe_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1: it counts optimizer steps.")
        self.every, self.per_layer, self.probe_every = every, per_layer, probe_every
        self.probe = None if probe is None else RoutingProbe([probe] if isinstance(probe, Mapping) else list(probe))
        self.meter: ExpertLoadMeter | None = None
        self._watching = ExitStack()
        self._probed_at = 0

    def attach(self, trainer: Trainer) -> RouterMonitorCallback:
        """Add the monitor to a trainer before the callbacks that report to W&B, TensorBoard and the like."""
        callbacks = trainer.callback_handler.callbacks
        flows = [place for place, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)]
        callbacks.insert(flows[0] + 1 if flows else 0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Find the experts and begin to listen; one warning and nothing more for a model without any."""
        self._stop()
        try:
            layers_to_watch(model)
        except ValueError as error:
            logger.warning("RouterMonitorCallback logs nothing: %s", error)
            return
        self.meter = ExpertLoadMeter(model)
        self._watching.callback(self.meter.close)
        self._listen(_whole_of_experts(model, self.meter.experts))
        if self.probe is not None:
            self._probed_at = state.global_step
            self.probe.start(model, Path(args.output_dir) / PROBE_FILE, state.global_step, state.is_world_process_zero)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Close the step; nothing here waits for the device."""
        if self.meter is not None:
            self.meter.end_step()
            if self.every is not None and state.global_step % self.every == 0:
                control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Add the values to a training log, the one just written to the history included."""
        is_due = self.every is None or state.global_step % self.every == 0
        if self.meter is None or not is_due or not logs or "loss" not in logs:
            return
        values = self._balance() | self._saturation(state.global_step, model)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model as it was."""
        self._stop()

    def _balance(self) -> dict[str, float]:
        summary = self.meter.pop()
        if summary is None:
            return {}
        found = {"mri": summary.mri, "mri_normalized": summary.normalized, "load_entropy": summary.load_entropy}
        return {key: value for name, values in found.items() for key, value in self._entries(name, values).items()}

    def _saturation(self, step: int, model: nn.Module) -> dict[str, float]:
        if self.probe is None or step - self._probed_at < self.probe_every:
            return {}
        self._probed_at = step
        return self._entries("router_saturation", self.probe.saturation(model))

    def _entries(self, name: str, values: list[float]) -> dict[str, float]:
        layers = {f"{name}/layer_{layer:02d}": value for layer, value in enumerate(values)} if self.per_layer else {}
        return {name: sum(values) / len(values), **layers}

    # ---- which forward passes count ----

    def _listen(self, whole: nn.Module) -> None:
        """Observe each forward pass of `whole` that belongs to a training step."""
        names = list(inspect.signature(whole.forward).parameters)
        passes: list[ExitStack] = []

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            passes.append(ExitStack())
            if module.training and torch.is_grad_enabled():
                passes[-1].enter_context(
                    self.meter.observe(_token_mask(dict(zip(names, args, strict=False)) | kwargs))
                )

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            if passes:
                passes.pop().close()

        for handle in (
            whole.register_forward_pre_hook(begin, with_kwargs=True),
            whole.register_forward_hook(end, always_call=True),
        ):
            self._watching.callback(handle.remove)

    def _stop(self) -> None:
        self._watching.close()
        self.meter = None


def _whole_of_experts(model: nn.Module, experts: list[nn.Module]) -> nn.Module:
    """The innermost model of transformers that holds all experts, `model` itself if there is none.

    It lies outside of every part that checkpointing recomputes, and inside of the heads that some trainers leave out.
    """
    wanted = set(experts)
    whole = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return next((module for module in reversed(whole) if wanted <= set(module.modules())), model)


def _token_mask(inputs: dict[str, Any]) -> Tensor | None:
    """(B, S) where the model was given one of that form; None: every token counts."""
    mask = inputs.get("attention_mask")
    states = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if not isinstance(mask, Tensor) or states is None or mask.shape != states.shape[:2]:
        return None
    return mask
