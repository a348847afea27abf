"""The trainers' common answer to a machine, a disk, a rank or a batch that goes bad. Source: ours, but for:

- A loss is a spike if it exceeds m + k * max(s, m / 1000), m and s being mean and standard deviation of the last n
  good losses, k `spike_sigmas` and n `window`; the least s keeps a loss that hardly moves from making every step a
  spike. The rule is the usual z-score.
- Leaving batches out after going back is what PaLM did (arXiv 2204.02311, section 5.1).
- `enable_jit_checkpoint` of transformers saves on SIGTERM on one rank, three seconds after the signal.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import TrainOutput

from hf_moe_cpt.data.packing import IGNORED_LABEL
from hf_moe_cpt.machine import has_process_group, leave_process_group
from hf_moe_cpt.trainers.common.checkpointing import (
    HEARTBEATS,
    AtomicCheckpointMixin,
    WriteFailures,
    checkpoints_in,
    private_folder,
    read_beside,
    read_trainer_state,
    require_free_space,
    require_unused,
    resolve_resume,
    snapshot_folder,
    tidy_up,
)
from hf_moe_cpt.trainers.common.distributed import (
    RankAgreement,
    ShardedModelCallback,
    reduce_in_float32,
    reshard,
)
from hf_moe_cpt.trainers.common.metrics import StepTiming, TokenCount
from hf_moe_cpt.trainers.common.run_folder import (
    STATE_FILE,
    RunLock,
    compare_settings,
    describe_rows,
    is_inside,
    settings_of,
)


logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip", "rewind")
FILE = "bad_steps.json"  # in a checkpoint
UNLABELLED = "none of its tokens has a label, so there is nothing to learn from it"
LEAST_LOSSES = 8  # before so many are known nothing is a spike
LEAST_SPREAD = 1e-3  # of the mean
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
WATCHDOG_EXIT_CODE = 1


class LossHistory:
    """The last good losses of optimizer steps in `losses`, oldest first.

    spike_sigmas: 0 finds no spikes. window: number of losses that are compared with.
    """

    def __init__(self, spike_sigmas: float, window: int, losses: Iterable[float] = ()) -> None:
        self.spike_sigmas = spike_sigmas
        self.losses = deque(losses, maxlen=window)
        self.sum, self.count = 0.0, 0  # of all good losses of the run

    def add(self, loss: float) -> None:
        """Take a good loss up."""
        self.losses.append(loss)
        self.sum, self.count = self.sum + loss, self.count + 1

    def harm(self, loss: float, grad_norm: float, num_items: float = 1.0) -> str | None:
        """What is bad about a step, or None. num_items: labels that its loss is a mean over."""
        if not num_items:
            return UNLABELLED
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"its gradient norm is {grad_norm}"
        if not self.spike_sigmas or len(self.losses) < LEAST_LOSSES:
            return None
        mean = statistics.fmean(self.losses)
        spread = max(statistics.pstdev(self.losses, mean), LEAST_SPREAD * abs(mean))
        excess = (loss - mean) / spread if spread else 0.0
        if excess <= self.spike_sigmas:
            return None
        return (
            f"its loss {loss:.4g} lies {excess:.1f} standard deviations above the last {len(self.losses)} ({mean:.4g})"
        )


class RewindRequested(Exception):
    """The run has to go back to before `step`."""

    def __init__(self, step: int, harm: str) -> None:
        super().__init__(harm)
        self.step, self.harm = step, harm


class BadStepCallback(TrainerCallback):
    """What happens at an optimizer step whose loss or gradient norm is no number, or whose loss leaps.

    Watches the loss of each step, the mean over ranks, as `Trainer` adds it up in `_tr_loss`.
    stop: FloatingPointError, when the step is logged or before it is saved, on the CPU at once.
    skip: the step's gradients are dropped before the optimizer sees them, so weights and moments stay as they were;
    data and learning rate go on. It reads the loss from the device at every step.
    rewind: the run goes back to the last whole checkpoint before the step and leaves the step out when it comes by
    again; this also helps where the weights are harmed already.

    trainer: its `_tr_loss`, and `_describe_batch(step)` where it has one, for what a message calls the data.
    """

    def __init__(self, trainer: Any, policy: str, spike_sigmas: float, window: int, limit: int) -> None:
        self.policy, self.limit = policy, limit
        self.agreement: RankAgreement | None = None
        self.grad_norm: Tensor | float = 0.0  # of the step, told by the trainer
        self.num_items: Tensor | float | None = None  # labels of the optimizer batch, where the trainer counts them
        self.left_out: set[int] = set()  # steps to leave out when they come by
        self._trainer = trainer
        self._history = LossHistory(spike_sigmas, window)
        self._before: Tensor | None = None  # _tr_loss at the begin of the step
        self._unread: list[tuple[int, tuple[Tensor, ...]]] = []  # step; loss, norm, labels, on the device
        self._in_a_row = self._rewinds = 0
        self._left_out_since_log = self._logged_at = 0

    # ---- the state that goes with a checkpoint ----

    def save(self, checkpoint: Path) -> None:
        """Write what later decisions depend on."""
        state = {"losses": list(self._history.losses), "left_out": sorted(self.left_out), "in_a_row": self._in_a_row}
        state |= {"sum": self._history.sum, "count": self._history.count}
        (checkpoint / FILE).write_text(json.dumps(state))

    def load(self, checkpoint: Path | None) -> None:
        """Read what `save` wrote; nothing is known where there is no file. `left_out` is kept and added to."""
        counted = {"left_out": list[int], "in_a_row": int, "count": int}
        state = read_beside(checkpoint, FILE, losses=list[float], sum=float, **counted)
        window = self._history.losses.maxlen
        self._history = LossHistory(self._history.spike_sigmas, window, state.get("losses", ()))
        self._history.sum, self._history.count = state.get("sum", 0.0), state.get("count", 0)
        self.left_out |= set(state.get("left_out", ()))
        self._in_a_row = state.get("in_a_row", 0)
        self._before, self._unread, self._left_out_since_log = None, [], 0

    # ---- in the step ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember where the log stands."""
        self._logged_at = state.global_step

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
        row = (loss, *(torch.as_tensor(v, device=loss.device).detach().clone() for v in self._told()))
        if step in self.left_out:
            self._leave_out(step, "it was bad before the run went back", model)
        elif self.policy == "skip":
            (measured,) = self._mean_over_ranks([row])
            harm = self._history.harm(*measured)
            if harm is None:
                self._history.add(measured[0])
                self._in_a_row = 0
                return
            self._in_a_row += 1
            if self._in_a_row > self.limit:
                self._raise(step, harm, f"and so were the {self.limit} steps before it (bad_step_limit)")
            self._leave_out(step, harm, model)
        else:
            self._unread.append((step, row))
            if self.policy == "stop" and loss.device.type == "cpu" and not has_process_group():
                self.check()

    def _told(self) -> tuple[Tensor | float, Tensor | float]:
        return self.grad_norm, 1.0 if self.num_items is None else self.num_items

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
        for (step, _), measured in zip(unread, self._mean_over_ranks([row for _, row in unread]), strict=True):
            harm = self._history.harm(*measured)
            if harm is None:
                self._history.add(measured[0])
            elif self.policy == "rewind":
                raise RewindRequested(step, harm)
            else:
                self._raise(step, harm, "and nothing was saved after it")

    def corrected(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """What is to be added to the log entry of `step`: the mean loss of the steps that count, and how many do not.

        The sum of losses has nothing of a step that was left out, but was divided by all.
        """
        steps, self._logged_at = step - self._logged_at, step
        left_out, self._left_out_since_log = self._left_out_since_log, 0
        if not left_out:
            return {}
        counted = steps - left_out
        return {"loss": logs["loss"] * steps / counted if counted else float("nan"), "steps_left_out": left_out}

    def mean_loss(self) -> float:
        """The mean loss of all good steps of the run, also of those before it was resumed; NaN before the first."""
        return self._history.sum / self._history.count if self._history.count else math.nan

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
        if harm == UNLABELLED:
            raise ValueError(
                f"Step {step} ({self._data_of(step)}): {harm}. A document of one token has no label: drop such "
                "documents, take longer blocks or larger batches, or leave the step out with bad_step_policy='skip'."
            )
        raise FloatingPointError(
            f"Step {step} is bad ({self._data_of(step)}): {harm}, {circumstance}. Training stopped: resume from the "
            "last checkpoint with a lower learning_rate, look at that batch, or set bad_step_policy to skip or rewind."
        )

    def _data_of(self, step: int) -> str:
        describe = getattr(self._trainer, "_describe_batch", None)
        return f"optimizer batch {step}" if describe is None else describe(step)

    def _mean_over_ranks(self, rows: list[tuple[Tensor, ...]]) -> list[tuple[float, ...]]:
        flat = torch.stack([torch.stack([value.float() for value in row]) for row in rows])
        values = flat.double().flatten().tolist()  # waits for the device
        if self.agreement is not None:
            values = self.agreement.of_all(values).mean(0).tolist()
        return list(zip(values[::3], values[1::3], values[2::3], strict=True))


class Preempted(SystemExit):
    """Ends the process with 143 = 128 + SIGTERM, unless it is caught; `step` is where the run stopped."""

    def __init__(self, step: int) -> None:
        super().__init__(SIGTERM_EXIT_CODE)
        self.step = step


class PreemptionCallback(TrainerCallback):
    """Saves and stops if any rank was sent SIGTERM, as schedulers do before they take a machine back.

    The step in progress is finished (with several ranks one more, in which they agree), a checkpoint is saved, and the
    process ends with `Preempted`. A measurement that is due at that step is left out.
    """

    def __init__(self) -> None:
        self.agreement: RankAgreement | None = None
        self._is_signalled = False
        self._is_stopping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of ending the process; only the main thread of a process can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Let all ranks stop at the same step."""
        agreed = self._is_signalled if self.agreement is None else self.agreement.any_of(self._is_signalled)
        if agreed and state.global_step < state.max_steps:  # at the last step there is nothing to cut short
            self._is_stopping = True
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave, now that the checkpoint is written."""
        if not self._is_stopping:
            return
        if state.is_world_process_zero:
            logger.warning(
                "SIGTERM: stopped after step %d of %d and saved. Go on with resume_from_checkpoint='last'.",
                state.global_step,
                state.max_steps,
            )
        raise Preempted(state.global_step)


@dataclass(frozen=True)
class Heartbeat:
    """One line of a rank."""

    beats: int
    events: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"{self.beats} {self.events} {self.step} {self.doing}"

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """The line in a file, or None if there is none or it is being written."""
        try:
            beats, events, step, doing = path.read_text().split(" ", 3)
            return cls(int(beats), int(events), int(step), doing)
        except (OSError, ValueError):
            return None


def blame(before: list[Heartbeat | None], now: list[Heartbeat | None], waited: float) -> str:
    """What holds the run up, from the lines of all ranks at two times `waited` seconds apart.

    Ranks without a sign of life come first, then those that are behind.
    """
    unseen = [rank for rank, beat in enumerate(now) if beat is None]
    stopped = [
        rank for rank, beat in enumerate(now) if beat is not None and before[rank] and beat.beats == before[rank].beats
    ]
    if stopped or unseen:
        told = [f"rank {rank} is stopped or dead (no sign of life for {waited:.0f} s)" for rank in stopped]
        told += [
            f"of rank {rank} nothing is seen (has it ended, or is output_dir not shared by all hosts?)"
            for rank in unseen
        ]
        return "; ".join(told)
    least = min(beat.events for beat in now)
    behind = [rank for rank, beat in enumerate(now) if beat.events == least]
    if len(behind) == len(now):
        return f"all ranks are alive and none moves, at step {now[0].step} ({now[0].doing})"
    return "; ".join(f"rank {rank} is behind, at step {now[rank].step} ({now[rank].doing})" for rank in behind)


def _event(doing: str) -> Callable[..., None]:
    """A method of `Watchdog` for an event of the Trainer, after which the rank does what `doing` says."""

    def tell(self: Watchdog, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.did(state.global_step, doing)

    return tell


class Watchdog(TrainerCallback):
    """Ends this process with WATCHDOG_EXIT_CODE and a message when it has done nothing for `timeout` seconds.

    Every rank has a thread that writes a line into `_heartbeats` of the output folder: a counter, which grows as long
    as the process runs, how many things the rank has done, its step, and what it does. When a rank has done nothing
    for `timeout` its thread reads the lines of all: a counter that stands still belongs to a process that is stopped
    or dead; otherwise the ranks that have done least are the ones that the others wait for.

    timeout: seconds; longer than the longest save and the longest evaluation of other trainers, which do not tell how
    far they are. end: what is called with the message, for tests.
    """

    def __init__(self, output_dir: str | Path, timeout: float, rank: int, world_size: int) -> None:
        self.folder = Path(output_dir) / HEARTBEATS
        self.timeout, self.rank, self.world_size = timeout, rank, world_size
        self.interval = min(5.0, timeout / 5)
        self.end: Callable[[str], None] = self._end_process
        self._events, self._step, self._doing = 0, 0, "starting"
        self._beats, self._seen_events, self._since = 0, -1, 0.0
        self._earlier, self._earlier_at = None, 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            (self.folder / f"rank-{self.rank}").unlink(missing_ok=True)
            with suppress(OSError):  # others are still there
                self.folder.rmdir()

    def did(self, step: int, doing: str) -> None:
        """The rank got on: it is at `step` and begins what `doing` says."""
        self._step, self._doing = step, doing
        self._events += 1

    # ---- the thread ----

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            message = self.beat(time.monotonic())
            if message is not None:
                self.end(message)
                return

    def beat(self, now: float) -> str | None:
        """One round at `now` seconds: write the line of this rank; returns why the run is to end, or None."""
        self._beats += 1
        self._write(Heartbeat(self._beats, self._events, self._step, self._doing))
        if self._events != self._seen_events:
            self._seen_events, self._since, self._earlier = self._events, now, None
            return None
        waited = now - self._since
        if self._earlier is None:  # who stands still shows from one round to another
            if waited > self.timeout / 2:
                self._earlier, self._earlier_at = self._read_all(), now
            return None
        if waited <= self.timeout:
            return None
        cause = blame(self._earlier, self._read_all(), now - self._earlier_at)
        return f"Nothing has moved on rank {self.rank} for {waited:.0f} s (hang_timeout): {cause}."

    def _write(self, beat: Heartbeat) -> None:
        path = self.folder / f"rank-{self.rank}"
        try:
            path.with_suffix(".new").write_text(str(beat))
            path.with_suffix(".new").replace(path)
        except OSError as error:  # a full disk must not end the watch
            logger.debug("%s: %s", path, error)

    def _read_all(self) -> list[Heartbeat | None]:
        return [Heartbeat.read(self.folder / f"rank-{rank}") for rank in range(self.world_size)]

    def _end_process(self, message: str) -> None:
        logger.critical("%s The process ends; start again with resume_from_checkpoint='auto'.", message)
        logging.shutdown()
        os._exit(WATCHDOG_EXIT_CODE)  # the main thread waits in a collective and cannot be told

    # ---- what a rank does ----

    on_train_begin = _event("before the first step")
    on_step_begin = on_substep_end = _event("in the step")
    on_prediction_step = _event("measuring")
    on_log = _event("after a log")
    on_save = _event("waiting for data")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The step is through; tell what comes now."""
        doing = "logging or saving" if control.should_log or control.should_save else "waiting for data"
        self.did(state.global_step, "measuring" if control.should_evaluate else doing)


class FaultTolerantMixin(AtomicCheckpointMixin):
    """Mixin in front of `Trainer`, whose arguments are `FaultToleranceArguments`.

    `open_run` is to be called by `train` before anything is computed; `may_be_there` names what of a run may lie in
    its folder before. Overrides `train` (watches begin and end; a rewind starts the loop again), `_run_epoch` (not of
    a run that is over), `log` and `_save_checkpoint` (bad steps are looked for first), `get_batch_samples` (time
    without data, tokens), `_build_accelerator_args` (how DDP keeps gradients), `_get_grad_norm` (a norm that is no
    number), `create_optimizer` (of shards, where a pass
    before training has gathered some) and `_load_optimizer_and_scheduler` (settings that were changed).
    """

    may_be_there: tuple[str, ...] = ()
    has_one_backward = True  # a micro-batch: nobody takes gradients away and keeps them
    stop_reason: str | None = None  # why the run is over before max_steps

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.token_count = TokenCount()
        self._settings: dict[str, Any] = {}  # those that decide about numbers, on the first rank
        self._changed: list[str] = []  # of these, those that the checkpoint was not made with
        super().__init__(*args, **kwargs)
        settings = self.args
        settings.ranks_of_a_row = self.get_tp_size()
        self.token_count.copies = settings.ranks_of_a_row
        reduce_in_float32(getattr(self.accelerator.state, "fsdp_plugin", None))
        self._reduce_every_pass()
        self._refuse_cut_sequences()
        self._refuse_adapted_parts()
        policy = settings.bad_step_policy
        if policy != "stop" and self.is_deepspeed_enabled:
            raise ValueError(
                f"bad_step_policy={policy!r} drops gradients, which DeepSpeed keeps to itself: use stop, or FSDP."
            )
        rule = (settings.spike_sigmas, settings.spike_window, settings.bad_step_limit)
        self.bad_steps = BadStepCallback(self, policy, *rule)
        self.step_timing = StepTiming(self.model) if settings.log_step_timing else None
        self.watchdog = None
        if settings.world_size > 1 and settings.hang_timeout:
            place = (settings.process_index, settings.world_size)
            self.watchdog = Watchdog(settings.output_dir, settings.hang_timeout, *place)
        listens = settings.save_on_sigterm and settings.save_strategy != "no"
        self.preemption = PreemptionCallback() if listens else None
        for callback in (ShardedModelCallback(), self.bad_steps, self.step_timing, self.watchdog, self.preemption):
            if callback is not None:
                self.add_callback(callback)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """The parent's; DDP's gradients lie in the buckets that it sends, and are not copied there and back."""
        found = super()._build_accelerator_args(**kwargs)
        for handler in found["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = self.has_one_backward
        return found

    def _reduce_every_pass(self) -> None:
        """Under FSDP2 let gradients be reduced to shards in each backward pass, unless somebody chose otherwise.

        Put off to the last micro-batch, as accelerate does by default, they lie whole and in float32 on every GPU.
        """
        asked = self.args.accelerator_config.gradient_accumulation_kwargs or {}
        shards = self.is_fsdp_enabled or getattr(self, "is_distributed_loading_by_transformers", False)
        if "sync_each_batch" not in asked:
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = shards

    def _refuse_cut_sequences(self) -> None:
        """torch's context parallelism knows one causal mask; accelerate drops the one of packed documents for it."""
        sizes = self.accelerator.parallelism_config
        for name in ("cp_size", "sp_size"):
            if (size := getattr(sizes, name, 1) or 1) > 1:
                raise ValueError(
                    f"{name}={size} in parallelism_config cuts sequences over ranks, which would let packed documents "
                    "see one another: set it to 1, and shorten max_length or recompute for long documents."
                )

    def _refuse_adapted_parts(self) -> None:
        """peft adds an adapter of fused experts to whole matrices."""
        for name, part in self.model.named_modules():
            if getattr(part, "_is_expert_parallel", False) and name.endswith("base_layer"):
                raise ValueError(
                    f"The experts at {name.partition('.base_layer')[0]} are dealt to ranks and have an adapter: adapt "
                    "other layers (--lora_target_modules), or train without --ep_size."
                )

    def open_run(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to go on from, None for a new run, after all that could be refused. A collective.

        Locks the output folder for this process, compares settings with those of the checkpoint, looks for room on the
        disk, and sets aside what the run cannot use. Raises ValueError in one line, on all ranks.
        """
        place = self.args.snapshot_dir
        if place is not None:
            failures = WriteFailures()
            failures.call(private_folder, snapshot_folder(place, Path(self.args.output_dir)))
            if (failure := failures.of_any_rank(self.args.world_size)) is not None:
                raise ValueError(failure)
        asked = asked or self.args.resume_from_checkpoint
        checkpoint, self._changed = self._of_first_rank(lambda: self._opened(asked))
        return checkpoint

    def _opened(self, asked: str | bool | None) -> tuple[Path | None, list[str]]:
        output_dir, changed = self.args.output_dir, []
        self._lock = RunLock.of(output_dir)
        checkpoint = resolve_resume(output_dir, asked, read_back=True)
        if checkpoint is None or not is_inside(checkpoint, output_dir):
            require_unused(output_dir, self.may_be_there, asked)
        self._settings = settings_of(self.args, self._facts())
        if checkpoint is not None:
            read_trainer_state(checkpoint)
            changed = compare_settings(checkpoint, self._settings, self.args.allow_changes or ())
        self._require_disk(is_new=checkpoint is None)
        self._lock.sign()
        tidy_up(output_dir, checkpoint)
        return checkpoint, changed

    def compared_data(self) -> Mapping[str, Any]:
        """Data sets by name whose rows must be the same when the run goes on."""
        return {"train": self.train_dataset}

    def _facts(self) -> dict[str, Any]:
        weights = list(self.model.parameters())
        rows = {f"data_{name}": describe_rows(rows) for name, rows in self.compared_data().items()}
        args, started_from = self.args, Path(self.model.config._name_or_path or "").name
        return rows | {
            "optimizer_batch": self.get_total_train_batch_size(args),
            "model": f"{self.model.config.model_type}, {sum(p.numel() for p in weights)} weights",
            "trained_weights": sum(p.numel() for p in weights if p.requires_grad),
            "started_from": started_from,
            "dtype": ", ".join(sorted({str(p.dtype) for p in weights if p.requires_grad})),
        }

    def _require_disk(self, is_new: bool) -> None:
        """What is saved of a model with an adapter is what is trained."""
        args, trained = self.args, [p for p in self.model.parameters() if p.requires_grad]
        saved = trained if hasattr(self.model, "peft_config") else list(self.model.parameters())
        weight_bytes = sum(p.numel() * p.element_size() for p in saved)
        moments = 0 if args.save_only_model else sum(p.numel() * p.element_size() for p in trained) // 4
        there = 0 if is_new else len(checkpoints_in(args.output_dir))
        copies = 1 if args.save_total_limit is None else args.save_total_limit + 1  # the newest comes, an old one goes
        copies = 0 if args.save_strategy == "no" else max(1, copies - there)
        require_free_space(args.output_dir, weight_bytes, moments, copies)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's, with all watches. Raises `Preempted`, which ends the process, after SIGTERM.

        Its loss is the mean over all steps of the run, wherever it was resumed.
        """
        checkpoint = resume_from_checkpoint
        with self._watches():
            while True:
                self.read_beside_state(None if checkpoint is None else Path(checkpoint))
                try:
                    output = super().train(checkpoint, *args, **kwargs)
                    return output._replace(training_loss=self.bad_steps.mean_loss())
                except RewindRequested as request:
                    found = self.whole_checkpoint_before(request.step)
                    self.bad_steps.went_back(request, found)
                    checkpoint = str(found)
                    self.args.eval_on_start = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The parent's optimizer; of the shards, where the model is sharded."""
        reshard(self.model)
        return super().create_optimizer(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The parent's; where settings were changed, rates, decay and betas are those that are set, not the saved."""
        groups, schedule = self.optimizer.param_groups, self.lr_scheduler
        fresh = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        bases = list(getattr(schedule, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._changed or checkpoint is None:
            return
        before = self._get_learning_rate()
        for group, own in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update({key: value for key, value in own.items() if key != "lr"})
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = bases
            rates = [base * rate(schedule.last_epoch) for base, rate in zip(bases, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        now = self._get_learning_rate()
        if self.is_world_process_zero():
            logger.warning("The learning rate goes on at %.4g; it was %.4g at the checkpoint.", now, before)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.stop_reason is not None or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the parent would make one step before it looks
        else:
            super()._run_epoch(*args, **kwargs)

    @contextmanager
    def _watches(self) -> Iterator[None]:
        if self.args.world_size > 1:
            agreement = RankAgreement(timedelta(seconds=self.args.ddp_timeout))
            for watch in (self.bad_steps, self.preemption, self.step_timing):
                if watch is not None:
                    watch.agreement = agreement
        if self.watchdog is not None:
            self.watchdog.start()
        try:
            with nullcontext() if self.preemption is None else self.preemption.listening():
                yield
        except Preempted:
            self.wait_for_checkpoint()
            leave_process_group()
            raise
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()
            self.wait_for_checkpoint()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The parent's, timed."""
        with nullcontext() if self.step_timing is None else self.step_timing.waiting_for_data():
            samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for sample in samples:
            self.token_count.add(sample)
        labels = [sample["labels"] for sample in samples if "labels" in sample]
        self.bad_steps.num_items = sum((row[..., 1:] != IGNORED_LABEL).sum() for row in labels) if labels else None
        return samples, num_items

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
            logs.update(self.bad_steps.corrected(logs, self.state.global_step))
            if self.step_timing is not None:
                logs.update(self.step_timing.pop())
        elif "train_loss" in logs:  # the parent's is of the steps of this call
            self.bad_steps.check()
            if math.isnan(loss := self.bad_steps.mean_loss()):
                del logs["train_loss"]  # of no step at all
            else:
                logs["train_loss"] = loss
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.bad_steps.check()
        self.token_count.total(self.args.device)
        super()._save_checkpoint(model, trial)

    def save_beside_state(self, checkpoint: Path) -> None:
        """Keep what decides about later steps."""
        super().save_beside_state(checkpoint)
        self.bad_steps.save(checkpoint)
        state = {"settings": self._settings, "tokens_seen": self.token_count.last}
        (checkpoint / STATE_FILE).write_text(json.dumps(state, indent=1))

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """Take up what `save_beside_state` kept."""
        super().read_beside_state(checkpoint)
        lacks = [] if checkpoint is None else [name for name in (FILE, STATE_FILE) if not (checkpoint / name).exists()]
        if lacks and self.is_world_process_zero():
            logger.warning(
                "%s holds no %s: train_loss and tokens are counted from here on.", checkpoint, " and no ".join(lacks)
            )
        self.bad_steps.load(checkpoint)
        self.token_count.begin(read_beside(checkpoint, STATE_FILE, tokens_seen=int).get("tokens_seen", 0))


@dataclass
class FaultToleranceArguments:
    """What to do when something goes bad. A mixin before `TrainingArguments`."""

    # --- when a machine, a disk, a rank or a batch goes bad ---
    snapshot_dir: str | None = HfArg(
        default=None,
        help="Fast folder of each host, such as one under /dev/shm, into which a checkpoint is written; "
        "a thread copies it to output_dir while training goes on. Unset: training waits for output_dir.",
    )
    save_in_background: bool = HfArg(
        default=True,
        help="Write checkpoints of a sharded model while training goes on; takes room for a rank's part in the "
        "host's memory.",
    )
    save_whole_weights: bool = HfArg(
        default=False,
        help="Write whole weights into each checkpoint of a sharded model too, not only at the end.",
    )
    rescue_dir: str | None = HfArg(
        default=None,
        help="Where the model goes at the end if output_dir takes it no more; unset: the folder of temporary files.",
    )
    allow_changes: list[str] | None = HfArg(
        default=None,
        help="Settings, a,b, that may differ from those of the checkpoint that a run is resumed from, although "
        "its numbers depend on them.",
    )
    save_on_sigterm: bool = HfArg(
        default=True, help="On SIGTERM finish the step, save, and end with exit code 143; not with save_strategy no."
    )
    hang_timeout: float = HfArg(
        default=1500.0,
        help="Seconds without any progress after which a run on several ranks ends and names the rank that "
        "holds it up; more than the longest save takes. 0 leaves the watch out.",
    )
    bad_step_policy: str = HfArg(
        default="stop",
        metadata={"choices": list(POLICIES)},
        help="When the loss of a step is no number or a spike: stop; skip, drop the step's gradients; rewind, "
        "go back to the last checkpoint and leave the step out. skip reads the loss at every step.",
    )
    spike_sigmas: float = HfArg(
        default=0.0,
        help="Standard deviations above the mean of the last spike_window losses from which on a loss is a "
        "spike; 0: only NaN and infinity are bad.",
    )
    spike_window: int = HfArg(default=50, help="Losses that a loss is compared with, at least 8.")
    bad_step_limit: int = HfArg(
        default=5, help="Steps in a row that are skipped, or times that the run goes back, at most."
    )
    log_step_timing: bool = HfArg(
        default=True, help="Log seconds of a step, of waiting for data, and of the slowest rank."
    )
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Replace a loss that is no number in the log, which hides it from the policy."
    )

    ranks_of_a_row = 1  # not a setting: a trainer knows it by its model

    @property
    def num_data_ranks(self) -> int:
        """Ranks with rows of their own; those that share tensors share rows too."""
        return self.world_size // self.ranks_of_a_row

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if self.bad_step_policy not in POLICIES:
            raise ValueError(f"bad_step_policy={self.bad_step_policy!r} is unknown: choose {', '.join(POLICIES)}.")
        if self.bad_step_policy != "stop" and getattr(self, "fp16", False):
            raise ValueError(
                f"bad_step_policy={self.bad_step_policy!r} with fp16, whose scaler leaves steps out by itself: use "
                "bf16, or stop."
            )
        for name, least in (("spike_sigmas", 0), ("hang_timeout", 0), ("bad_step_limit", 1), ("spike_window", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.snapshot_dir is not None and self.snapshot_dir == getattr(self, "output_dir", None):
            raise ValueError(f"snapshot_dir={self.snapshot_dir!r} is output_dir: name a folder on a faster disk.")
        if self.allow_changes is not None:
            given = [self.allow_changes] if isinstance(self.allow_changes, str) else self.allow_changes
            self.allow_changes = [name for words in given for name in words.replace(",", " ").split()]
        super().__post_init__()
