"""The trainers' common answer to faults: whole checkpoints, SIGTERM, ranks that hang, bad steps, and slow ranks.

Each of them has a file of its own beside this one, which wires them into `Trainer`. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_moe_cpt.trainers.instruments.bad_steps import BadSteps, RewindRequested
from hf_moe_cpt.trainers.instruments.hang_watch import HangWatch
from hf_moe_cpt.trainers.instruments.preemption import Preempted, PreemptionWatch
from hf_moe_cpt.trainers.instruments.rank_agreement import RankAgreement
from hf_moe_cpt.trainers.instruments.ranks import leave_process_group, reduce_in_float32, reshard
from hf_moe_cpt.trainers.instruments.step_timing import StepTiming
from hf_moe_cpt.trainers.instruments.whole_checkpoints import WholeCheckpoints


class SurvivesFaults(WholeCheckpoints):
    """Mixin in front of `Trainer`, whose arguments are a `FaultSettings`.

    Overrides `train` (watches begin and end; a rewind starts the loop again), `log` and `_save_checkpoint` (bad steps
    are looked for first), `get_batch_samples` (time without data), `_get_grad_norm` (a norm that is no number) and
    `create_optimizer` (of shards, where a pass before training has gathered some).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        faults = self.args
        reduce_in_float32(getattr(self.accelerator.state, "fsdp_plugin", None))
        if faults.bad_step_policy != "stop" and self.is_deepspeed_enabled:
            raise ValueError(
                f"bad_step_policy={faults.bad_step_policy!r} drops gradients, which DeepSpeed keeps to itself: use "
                "stop, or FSDP."
            )
        self.bad_steps = BadSteps(
            self, faults.bad_step_policy, faults.spike_sigmas, faults.spike_window, faults.bad_step_limit
        )
        self.preemption, self._logged_at = PreemptionWatch(), 0
        self.step_timing = StepTiming(self.model) if faults.log_step_timing else None
        self.hang_watch = None
        if faults.world_size > 1 and faults.hang_timeout:
            self.hang_watch = HangWatch(
                faults.output_dir, faults.hang_timeout, faults.process_index, faults.world_size
            )
        saves = str(getattr(faults.save_strategy, "value", faults.save_strategy)) != "no"
        self._listens = faults.save_on_sigterm and saves
        found = (self.bad_steps, self.step_timing, self.hang_watch, self.preemption if self._listens else None)
        for callback in (*found, _EndOfEpoch(self)):
            if callback is not None:
                self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's, with all watches. Raises `Preempted`, which ends the process, after SIGTERM."""
        checkpoint = resume_from_checkpoint
        with self._watches():
            while True:
                self.read_beside_state(None if checkpoint is None else Path(checkpoint))
                try:
                    return super().train(checkpoint, *args, **kwargs)
                except RewindRequested as request:
                    found = self.whole_checkpoint_before(request.step)
                    self.bad_steps.went_back(request, found)
                    checkpoint = str(found)
                    self.args.eval_on_start = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The parent's optimizer; of the shards, where the model is sharded."""
        reshard(self.model)
        return super().create_optimizer(*args, **kwargs)

    @contextmanager
    def _watches(self) -> Iterator[None]:
        if self.args.world_size > 1:
            agreement = RankAgreement(timedelta(seconds=self.args.ddp_timeout))
            for watch in (self.bad_steps, self.preemption, self.step_timing):
                if watch is not None:
                    watch.agreement = agreement
        if self.hang_watch is not None:
            self.hang_watch.start()
        try:
            if self._listens:
                with self.preemption.listening():
                    yield
            else:
                yield
        except Preempted:
            self.wait_for_checkpoint()
            leave_process_group()
            raise
        finally:
            if self.hang_watch is not None:
                self.hang_watch.stop()
            self.wait_for_checkpoint()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The parent's, timed."""
        if self.step_timing is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        with self.step_timing.waiting_for_data():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not self.args.fp16:  # whose scaler meets infinity all the time and deals with it
            self.bad_steps.grad_norm = norm
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's; a training log is corrected for steps that were left out, and tells where the time went."""
        if "loss" in logs:
            self.bad_steps.check()
            logs.update(self.bad_steps.corrected(logs, self.state.global_step - self._logged_at))
            self._logged_at = self.state.global_step
            if self.step_timing is not None:
                logs.update(self.step_timing.pop())
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.bad_steps.check()
        super()._save_checkpoint(model, trial)

    def save_beside_state(self, checkpoint: Path) -> None:
        """Keep what decides about later steps."""
        super().save_beside_state(checkpoint)
        self.bad_steps.save(checkpoint)

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """Take up what `save_beside_state` kept."""
        super().read_beside_state(checkpoint)
        self.bad_steps.load(checkpoint)


class _EndOfEpoch(TrainerCallback):
    """Before the parent tidies its checkpoints up, the one in progress must be there."""

    def __init__(self, trainer: SurvivesFaults) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer._logged_at = state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.wait_for_checkpoint()
