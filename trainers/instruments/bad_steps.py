"""What happens at an optimizer step whose loss is no number or leaps: the run stops, leaves it out, or goes back.

stop: FloatingPointError, when the step is logged or before it is saved. skip: the step's gradients are dropped before
the optimizer sees them, so weights and moments stay as they were; data and learning rate go on. rewind: the run goes
back to the last whole checkpoint before the step and leaves the step out when it comes by again; this also helps
where the weights are harmed already. skip reads the loss from the device at every step, the others when something is
logged or saved. Source: ours; leaving batches out after going back is what PaLM did (arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.trainers.instruments.loss_history import LossHistory
from hf_moe_cpt.trainers.instruments.rank_agreement import RankAgreement


logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip", "rewind")
FILE = "bad_steps.json"  # in a checkpoint


class RewindRequested(Exception):
    """The run has to go back to before `step`."""

    def __init__(self, step: int, harm: str) -> None:
        super().__init__(harm)
        self.step, self.harm = step, harm


class BadSteps(TrainerCallback):
    """Watches the loss of each optimizer step, the mean over ranks, as `Trainer` adds it up in `_tr_loss`.

    trainer: its `_tr_loss`, and `_describe_batch(step)` where it has one, for what a message calls the data.
    """

    def __init__(self, trainer: Any, policy: str, spike_sigmas: float, window: int, limit: int) -> None:
        self.policy, self.limit = policy, limit
        self.agreement: RankAgreement | None = None
        self.grad_norm: Tensor | float = 0.0  # of the step, told by the trainer
        self.left_out: set[int] = set()  # steps to leave out when they come by
        self._trainer = trainer
        self._history = LossHistory(spike_sigmas, window)
        self._before: Tensor | None = None  # _tr_loss at the begin of the step
        self._unread: list[tuple[int, Tensor, Tensor | float]] = []  # step, loss, norm; on the device
        self._in_a_row = self._rewinds = 0
        self._left_out_since_log = 0

    # ---- the state that goes with a checkpoint ----

    def save(self, checkpoint: Path) -> None:
        """Write what later decisions depend on."""
        state = {"losses": list(self._history.losses), "left_out": sorted(self.left_out), "in_a_row": self._in_a_row}
        (checkpoint / FILE).write_text(json.dumps(state))

    def load(self, checkpoint: Path | None) -> None:
        """Read what `save` wrote; nothing is known where there is no file. `left_out` is kept and added to."""
        path = None if checkpoint is None else checkpoint / FILE
        state = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        window = self._history.losses.maxlen
        self._history = LossHistory(self._history.spike_sigmas, window, state.get("losses", ()))
        self.left_out |= set(state.get("left_out", ()))
        self._in_a_row = state.get("in_a_row", 0)
        self._before, self._unread, self._left_out_since_log = None, [], 0

    # ---- in the step ----

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember where the sum of losses stands."""
        self._before = self._trainer._tr_loss.detach().clone()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Leave the step out, decide about it now, or keep its loss for later."""
        step = state.global_step + 1
        loss = self._trainer._tr_loss.detach() - self._before
        if step in self.left_out:
            self._leave_out(step, "it was bad before the run went back", model)
        elif self.policy == "skip":
            ((loss, norm),) = self._mean_over_ranks([(loss, self.grad_norm)])
            harm = self._history.harm(loss, norm)
            if harm is None:
                self._history.add(loss)
                self._in_a_row = 0
                return
            self._in_a_row += 1
            if self._in_a_row > self.limit:
                self._raise(step, harm, f"and so were the {self.limit} steps before it (bad_step_limit)")
            self._leave_out(step, harm, model)
        else:
            norm = self.grad_norm
            self._unread.append((step, loss, norm.detach().clone() if isinstance(norm, Tensor) else norm))

    def _leave_out(self, step: int, harm: str, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        self._trainer._tr_loss.copy_(self._before)
        self._left_out_since_log += 1
        if self._trainer.is_world_process_zero():
            logger.warning("Step %d is left out (%s): %s.", step, self._data_of(step), harm)

    # ---- when something is logged or saved ----

    def check(self) -> None:
        """Look at the steps since the last call. A collective.

        Raises FloatingPointError under "stop", RewindRequested under "rewind".
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        for (step, _, _), (loss, norm) in zip(unread, self._mean_over_ranks([row[1:] for row in unread]), strict=True):
            harm = self._history.harm(loss, norm)
            if harm is None:
                self._history.add(loss)
            elif self.policy == "rewind":
                raise RewindRequested(step, harm)
            else:
                self._raise(step, harm, "and nothing was saved after it")

    def corrected(self, logs: dict[str, float], steps: int) -> dict[str, float]:
        """What is to be added to a log entry over `steps` steps: the mean loss of those that count, and how many not.

        The sum of losses has nothing of a step that was left out, but was divided by all.
        """
        left_out, self._left_out_since_log = self._left_out_since_log, 0
        if not left_out:
            return {}
        counted = steps - left_out
        return {"loss": logs["loss"] * steps / counted if counted else float("nan"), "steps_left_out": left_out}

    def went_back(self, request: RewindRequested, checkpoint: Path | None) -> None:
        """Note that the run goes back to `checkpoint`; raises FloatingPointError if it cannot, or did too often."""
        self._rewinds += 1
        if checkpoint is None:
            self._raise(request.step, request.harm, "and there is no whole checkpoint before it to go back to")
        if self._rewinds > self.limit:
            self._raise(request.step, request.harm, f"and the run went back {self.limit} times (bad_step_limit)")
        self.left_out.add(request.step)
        if self._trainer.is_world_process_zero():
            logger.warning(
                "Step %d is bad: %s. Going back to %s; this step (%s) will be left out.",
                request.step,
                request.harm,
                checkpoint.name,
                self._data_of(request.step),
            )

    def _raise(self, step: int, harm: str, circumstance: str) -> None:
        raise FloatingPointError(
            f"Step {step} is bad ({self._data_of(step)}): {harm}, {circumstance}. Training stopped: resume from the "
            "last checkpoint with a lower learning_rate, look at that batch, or set bad_step_policy to skip or rewind."
        )

    def _data_of(self, step: int) -> str:
        describe = getattr(self._trainer, "_describe_batch", None)
        return f"optimizer batch {step}" if describe is None else describe(step)

    def _mean_over_ranks(self, rows: list[tuple[Tensor, Tensor | float]]) -> list[tuple[float, float]]:
        flat = torch.stack([torch.stack([torch.as_tensor(v, device=r[0].device).float() for v in r]) for r in rows])
        values = flat.double().flatten().tolist()  # waits for the device
        if self.agreement is not None:
            values = self.agreement.of_all(values).mean(0).tolist()
        return list(zip(values[::2], values[1::2], strict=True))
