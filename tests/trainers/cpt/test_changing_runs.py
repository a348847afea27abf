"""Runs that are stopped, go on otherwise, and are extended: the blocks they read and the rates they learn at.

Mixtures are drawn by seed: up to eight sources, any weights, batches, micro-batches and places to stop.
"""

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from hf_moe_cpt.optim.schedules import SCHEDULES, STARTING_PHASES, learning_rate_at
from hf_moe_cpt.trainers.cpt.cpt_data import read_state, resumed_settings
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import config, logged, stop_at, without_clocks
from tests.helpers.tiny_models import tiny_model, tokenized


pytestmark = pytest.mark.slow
NUM_MIXTURES = 200
PARTS = 8  # in which they are run


@dataclass
class Drawn:
    """A run of a mixture, and where and how it goes on."""

    weights: dict[str, int]
    batch: int
    micro: tuple[int, int]  # before and after it stopped
    steps: int
    stop: int
    streaming: bool = False

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        draw = random.Random(seed)
        names = "abcdefgh"[: draw.randint(1, 8)]
        weights = {name: draw.choice((0, 1, 2, 3, draw.randint(1, 1000))) for name in names}
        weights["a"] = weights["a"] or 1
        batch = draw.randint(1, 12)
        sizes = [size for size in range(1, batch + 1) if batch % size == 0]
        steps = draw.randint(2, 7)
        micro = (draw.choice(sizes), draw.choice(sizes))
        return cls(weights, batch, micro, steps, draw.randint(1, steps - 1), streaming=draw.random() < 0.2)

    def trainer(self, folder: Path, micro: int, ranks: int = 1, workers: int = 0) -> CPTTrainer:
        """The run with micro-batches of a size, on ranks of this process's group."""
        args = config(
            folder, replay_ratio=0.0, mixture=self.weights, max_steps=self.steps, save_strategy="steps", save_steps=1,
            per_device_train_batch_size=micro, gradient_accumulation_steps=self.batch // micro // ranks, max_length=12,
            dataloader_num_workers=workers, shuffle_buffer=4, adam_epsilon=1e-3, save_total_limit=1,
        )  # fmt: skip
        texts = {name: tokenized(7 + 9 * place, place) for place, name in enumerate(self.weights)}
        if self.streaming:
            texts = {name: text.to_iterable_dataset(num_shards=2) for name, text in texts.items()}
        return CPTTrainer(tiny_model("llama", num_hidden_layers=1, attention_dropout=0.1), args, texts)


Block = tuple[int, tuple[int, ...]]


def train(run: CPTTrainer, stop: int | None = None) -> list[Block]:
    """Train, or go on where something lies; the blocks that the model was given, in order, with their sources."""
    seen, inner = [], run.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.extend(zip(inputs["source"].tolist(), map(tuple, inputs["input_ids"].tolist()), strict=True))
        return inner(model, inputs, *args, **kwargs)

    run.compute_loss = compute_loss
    if stop is not None:
        run.add_callback(stop_at(stop))
    run.train("auto")
    return seen


def check_shares(drawn: Drawn, blocks: Iterable[Block]) -> None:
    """After every batch within 1 - 1 / (2S - 2) of what the weights say (Tijdeman 1980), half a block for two."""
    shares = [Fraction(weight, sum(drawn.weights.values())) for weight in drawn.weights.values()]
    seen, bound = [0] * len(shares), 1 - Fraction(1, max(2, 2 * len(shares) - 2))
    for number, (source, _) in enumerate(blocks, start=1):
        seen[source] += 1
        if number % drawn.batch == 0:
            assert all(abs(n - number * share) <= bound for n, share in zip(seen, shares, strict=True))


def assert_same(run: CPTTrainer, whole: CPTTrainer) -> None:
    logs = [without_clocks(each.state.log_history[:-1]) for each in (run, whole)]
    assert logs[0] == logs[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


@pytest.mark.parametrize("part", range(PARTS))
def test_two_hundred_mixtures_hold_their_shares_and_go_on(tmp_path, part):
    """Stopped and gone on with the same micro-batches a run is bit for bit the one that was not; with others, and with
    workers, it is given the same blocks."""
    for seed in range(part, NUM_MIXTURES, PARTS):
        drawn = Drawn.of(seed)
        folder, micro = tmp_path / str(seed), drawn.micro
        whole = drawn.trainer(folder / "whole", micro[0])
        blocks = train(whole)
        assert len(blocks) == drawn.batch * drawn.steps
        check_shares(drawn, blocks)
        before = train(drawn.trainer(folder / "run", micro[0]), drawn.stop)
        shutil.copytree(folder / "run", folder / "other")
        run = drawn.trainer(folder / "run", micro[0])
        assert before + train(run) == blocks, drawn
        assert_same(run, whole)
        workers = 2 if seed % 5 == 0 and not drawn.streaming else 0
        other = drawn.trainer(folder / "other", micro[1], workers=workers)
        assert before + train(other) == blocks, drawn
        assert logged(other.state.log_history, "loss") == pytest.approx(logged(whole.state.log_history, "loss"), 1e-3)
        shutil.rmtree(folder)


@pytest.mark.parametrize("phase", STARTING_PHASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_extended_without_a_jump_and_as_drawn(tmp_path, schedule, phase):
    """From a checkpoint of each phase and the last; re-warmed too. Against the rates in the log."""
    settings = {"replay_ratio": 0.0, "mixture": {"a": 1}, "cpt_schedule": schedule, "starting_phase": phase}
    settings |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1, "max_length": 12}
    if phase == "scratch":
        settings |= {"warmup_fraction": 0.25, "cooldown_fraction": 0.25, "constant_fraction": 0.25}
        settings |= {"anneal_fraction": 0.25}
        if schedule in ("cosine", "linear"):
            settings |= {"cooldown_fraction": 0.0, "constant_fraction": 0.0, "anneal_fraction": 0.75}

    def run(folder, **changes):
        args = config(folder, **{**settings, **changes})
        return CPTTrainer(tiny_model("llama", num_hidden_layers=1), args, {"a": tokenized(30, 1)})

    run(tmp_path / "first", max_steps=12).train()
    for stop in (2, 5, 8, 10, 12):
        for rewarm in (False, True):
            folder = tmp_path / f"{stop}-{rewarm}"
            shutil.copytree(tmp_path / "first", folder)
            start = folder / f"checkpoint-{stop}"
            state = read_state(str(start))
            more = {"max_steps": 30, "allow_changes": "max_steps,rewarm", "rewarm": rewarm}
            if state["learning_rate"] == 0 and not rewarm:
                with pytest.raises(ValueError, match="ended at step 12 with a rate of 0"):
                    run(folder, **more).train(str(start))
                continue
            drawn = resumed_settings(str(start), 30, rewarm)
            longer = run(folder, **more)
            longer.train(str(start))
            rates = logged(longer.state.log_history, "learning_rate")
            assert rates[stop:] == pytest.approx([learning_rate_at(step, **drawn) for step in range(stop, 30)])
            assert rates[stop] == pytest.approx(state["learning_rate"])
            if not rewarm and state["phase"] != "warmup":
                assert max(rates[stop:]) == pytest.approx(state["learning_rate"])
            if not rewarm:
                rise = [after - before for before, after in zip(rates[stop:], rates[stop + 1 :], strict=False)]
                assert max(rise) <= (longer.args.learning_rate / 5 if state["phase"] == "warmup" else 1e-9)
            assert longer.state.global_step == 30
            shutil.rmtree(folder)
