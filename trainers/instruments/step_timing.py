"""Where the seconds of a step go, and which rank is slow: waiting for data, the forward pass, the step as a whole.

Ranks wait for each other in the backward pass, so their steps take equally long and only what a rank does by itself
tells a straggler: the seconds that it waits for data and those of its forward passes. On CUDA the passes are timed by
events that are read when something is logged; nothing waits for the device. Under FSDP a forward pass also holds what
it gathers from others. Source: ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.trainers.instruments.rank_agreement import RankAgreement


class StepTiming(TrainerCallback):
    """Seconds for each optimizer step, means since the last log; evaluation and saving are not in them."""

    def __init__(self, model: nn.Module) -> None:
        self.agreement: RankAgreement | None = None
        self._on_cuda = next(model.parameters()).is_cuda
        self._began: list[Any] = []
        self._passes: list[tuple[Any, Any]] = []
        self._waited = self._stepped = 0.0
        self._since: float | None = None
        self._ended = 0.0
        self._steps = 0
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time inside is time without data; the step begins here."""
        began = time.perf_counter()
        self._since = began
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training:
            self._began.append(self._now())

    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training and self._began:
            self._passes.append((self._began.pop(), self._now()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the step."""
        self._steps += 1
        self._ended = time.perf_counter()
        if self._since is not None:
            self._stepped += self._ended - self._since

    def pop(self) -> dict[str, float]:
        """The means since the last call, over all ranks; to be called when the loss was just read. A collective.

        runtime/step, runtime/data_wait (of the rank that waited longest) and, with several ranks, runtime/rank_min and
        runtime/rank_max (own seconds of the fastest and the slowest) and runtime/slowest_rank.
        """
        if not self._steps:
            return {}
        self._stepped += time.perf_counter() - self._ended  # in which the loss was read, and the device waited for
        forward = sum(self._seconds(*times) for times in self._passes)
        own = [value / self._steps for value in (self._stepped, self._waited, self._waited + forward)]
        self._waited, self._stepped, self._steps, self._passes, self._began = 0.0, 0.0, 0, [], []
        ranks = torch.tensor([own]) if self.agreement is None else self.agreement.of_all(own)
        logs = {"runtime/step": float(ranks[:, 0].mean()), "runtime/data_wait": float(ranks[:, 1].max())}
        if len(ranks) > 1:
            slowest = int(ranks[:, 2].argmax())
            logs |= {
                "runtime/rank_min": float(ranks[:, 2].min()),
                "runtime/rank_max": float(ranks[slowest, 2]),
                "runtime/slowest_rank": slowest,
            }
        return logs

    def _seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1e3 if self._on_cuda else ended - began
