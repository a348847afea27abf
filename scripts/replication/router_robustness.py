"""How robust is your router? The claims of the continual pre-training paper, tested over seeds, models and shifts.

python scripts/replication/router_robustness.py --output_dir runs/routers
python scripts/replication/router_robustness.py --setting s --text text/ --device cuda --workers 4 --minutes 9

A chain is one model with one seed: pre-training on the old text, then for each new text continuing with every ratio of
replay; of some models, which the plan names, also from a decayed start, the union from scratch, and replay of what
drifted most. A chain that is killed goes on after its last finished run; one that is finished is a record under runs/
and is never run again; what an unfinished one has is judged too. What is claimed and how it is tested stands in
router_robustness.yaml, written before the runs. Seeds decide weights and order of the data for all models alike, so
that differences are paired by seed.

Source: Thérien et al. 2025 (arXiv 2503.05029) for the claims; two one-sided tests, Schuirmann 1987; the rest ours.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.data.python_corpus import build_python_corpus, train_byte_level_bpe
from hf_moe_cpt.data.text import load_text_dataset, tokenize_documents
from hf_moe_cpt.evaluation.resumable import write_json
from hf_moe_cpt.hub.upcycle import UpcycleOptions, upcycle
from hf_moe_cpt.machine import check_names, machine_facts
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.reading import read_json
from hf_moe_cpt.reports import text_table
from hf_moe_cpt.routing.compare import analyse_traces
from hf_moe_cpt.routing.hooks import active_parameters
from hf_moe_cpt.routing.metrics import ImbalanceShift, imbalance_around_shift, normalized_imbalance, recovery_step
from hf_moe_cpt.routing.trace import RoutingTrace, collect_routing
from hf_moe_cpt.scripts.replication.factbook import accuracies, continuations, write_task
from hf_moe_cpt.scripts.replication.sweep import (
    CONFIDENCE,
    LEAST_SEEDS,
    Crew,
    Estimate,
    check_request,
    end_of,
    grouped_bars,
    open_folder,
    plotting,
    quiet_process,
    seeds_needed,
    t_interval,
    tell_rest,
    write_page,
    write_results,
)
from hf_moe_cpt.trainers.common.metrics import ShortPrinter
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


PLAN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MODELS, CLAIMS = PLAN["models"], PLAN["claims"]
PRETRAINED, DECAYED, UNION, DRIFT, LONG = "pretrained", "decayed", "union", "drift", "long"
MEAN_STEPS = 20  # of the levels before and after a shift, and of the mean that must be back below one
MICRO = "-micro"  # behind the name of a model whose balance is that of each micro-batch and not of the batch
NEVER = 1000.0  # steps that stand for no return within a run
PEAK_STEPS = 50  # on either side of a shift, of which the highest are compared
HELD_OUT_FRACTION = 0.05
TRACED_TOKENS = 8192  # of each text, of a trace
PARTS = 32  # of the old text in the order of its files, of which the half that drifted most is replayed
WARMUP = {"warmup_fraction": 0.05, "cooldown_fraction": 0.70, "constant_fraction": 0.25, "anneal_fraction": 0.0}
DECAY = {"warmup_fraction": 0.0, "cooldown_fraction": 0.0, "constant_fraction": 0.0, "anneal_fraction": 1.0}

Runs = Mapping[str, dict[str, Any]]  # of one chain, by their names
Chains = Mapping[str, Mapping[int, Runs]]  # by model and seed


@dataclass(frozen=True)
class Scale:
    """A setting of the plan."""

    steps: int
    decay_steps: int
    continued_steps: int
    batch_size: int  # blocks of an optimizer step
    max_length: int
    learning_rate: float
    vocab_size: int
    held_out_tokens: int  # of each text
    seeds: int
    old: str
    # By new text: `ratios` of replay, the first 0, the last also that of the arms; models of the arms, by name
    shifts: dict[str, dict[str, list[Any]]]
    fields: dict[str, int] = field(default_factory=dict)
    router_bias_update_rate: float = 1e-3  # of the loss-free router
    micro_blocks: int = 1  # of a micro-batch of the models whose name ends in MICRO
    long_steps: int = 0  # of the arm that waits for a return, without replay
    characters: int | None = None  # of each text at most; None: all of it
    has_text: bool = False  # that of the Python installation, without --text
    questions: int = 0  # of downstream tasks, of each text at most; see factbook.py
    is_upcycled: bool = False  # --base is where training begins, dense or upcycled

    @property
    def texts(self) -> list[str]:
        """All texts, the old one first."""
        return [self.old, *self.shifts]

    def ratios(self, new: str) -> list[float]:
        """Shares of replay with which a new text is learnt, in order."""
        return self.shifts[new]["ratios"]

    def models_of(self, arm: str, new: str) -> list[str]:
        """The models that an arm is run with."""
        return self.shifts[new].get(arm, [])


SETTINGS = {name: Scale(**values) for name, values in PLAN["settings"].items()}


def continued(new: str, ratio: float, how: str = "") -> str:
    """The name of a run on a new text."""
    return f"{new}-{ratio:g}{how and '-' + how}"


@dataclass(frozen=True)
class Chain:
    """One model, one seed, one shift: all its runs. Chains of other shifts begin at the same pre-trained model."""

    method: str
    seed: int
    new: str

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.folder}-{self.new}"

    @property
    def folder(self) -> str:
        """Of its weights."""
        return f"{self.method}-{self.seed}"


def config_of(model: str, **fields: Any) -> CptMoeConfig:
    """The configuration behind the name of a model of the plan."""
    return CptMoeConfig.from_preset(f"{model.removesuffix(MICRO)}-tiny", **fields)


@cache
def experts_of(model: str) -> tuple[int, int]:
    """Experts, and experts of a token, of a model of the plan."""
    config = config_of(model)
    return config.num_experts, config.num_experts_per_tok


def balance_over_micro_batches(trainer: CPTTrainer) -> None:
    """Let the penalty count the load of each micro-batch alone, and not of the batch so far."""
    balance, so_far = trainer.balance, []
    load, restart, added_to = balance.meter.load, balance.meter.restart, balance.added_to

    def restarted() -> None:
        so_far.clear()
        restart()

    def of_micro_batch(over_ranks: bool = True) -> Any:
        so_far.append(load(over_ranks=over_ranks).clone())
        return so_far[-1] - so_far[-2] if len(so_far) > 1 else so_far[-1]

    def with_penalty(*loss_and_scale: Any) -> Any:
        balance.meter.load = of_micro_batch  # not for the log, which is about the batch
        try:
            return added_to(*loss_and_scale)
        finally:
            balance.meter.load = load

    balance.meter.restart, balance.added_to = restarted, with_penalty


class Worker:
    """Carries out chains in a process. folder: of the comparison; text and tokenizer lie in it, see `prepare`."""

    def __init__(self, scale: Scale, folder: Path, device: str, base: str | None = None) -> None:
        self.scale, self.folder, self.device, self.base = scale, folder, device, base
        torch.set_num_threads(1)
        torch._dynamo.config.recompile_limit = 64  # models of all kinds go through one process

    @cached_property
    def texts(self) -> dict[str, dict[str, Dataset]]:
        """Tokens of each text, train and held_out."""
        return {
            name: {
                side: datasets.load_from_disk(str(self.folder / "text" / name / side))
                for side in ("train", "held_out")
            }
            for name in self.scale.texts
        }

    def carry_out(self, chain: Chain) -> dict[str, Any]:
        """Every run of the chain; finished ones are read, the weights are removed after the last shift."""
        runs = dict(self._runs(chain))
        if chain.new == self.scale.texts[-1]:
            shutil.rmtree(self.folder / "work" / chain.folder)
        return {"runs": runs}

    def _runs(self, chain: Chain) -> Iterator[tuple[str, dict[str, Any]]]:
        """What most claims need comes first."""
        scale, new, ratios = self.scale, chain.new, self.scale.ratios(chain.new)
        steps, whole, shares = scale.continued_steps, {scale.old: 1.0}, {new: 1 - ratios[-1], scale.old: ratios[-1]}
        yield PRETRAINED, self._run(chain, PRETRAINED, scale.steps, None, whole, WARMUP)
        for ratio in ratios[:1] if chain.method.endswith(MICRO) else ratios:
            name = continued(new, ratio)
            yield name, self._run(chain, name, steps, PRETRAINED, {new: 1 - ratio, scale.old: ratio})
        if chain.method in scale.models_of(LONG, new):
            name = continued(new, ratios[0], LONG)
            yield name, self._run(chain, name, scale.long_steps, PRETRAINED, {new: 1.0})
        if chain.method in scale.models_of(DECAYED, new):
            yield DECAYED, self._run(chain, DECAYED, scale.decay_steps, PRETRAINED, whole, DECAY)
            name = continued(new, ratios[-1], DECAYED)
            yield name, self._run(chain, name, steps, DECAYED, shares)
        if chain.method in scale.models_of(DRIFT, new):
            name = continued(new, ratios[-1], DRIFT)
            drifted = self._drifted(self.folder / "work" / chain.folder, continued(new, ratios[0]))
            yield name, self._run(chain, name, steps, PRETRAINED, shares, replayed=drifted)
        if chain.method in scale.models_of(UNION, new):
            share = (scale.steps + ratios[-1] * steps) / (scale.steps + steps)
            name, both = f"{new}-{UNION}", {new: 1 - share, scale.old: share}
            yield name, self._run(chain, name, scale.steps + steps, None, both)

    def _run(
        self,
        chain: Chain,
        name: str,
        steps: int,
        start: str | None,
        shares: Mapping[str, float],
        phases: Mapping[str, float] | None = None,
        replayed: Callable[[], Dataset] | None = None,
    ) -> dict[str, Any]:
        """Train and measure. start: the run whose last checkpoint is continued. shares: the learnt text first."""
        work = self.folder / "work" / chain.folder
        if (done := work / name / "record.json").is_file():
            return read_json(done)
        shutil.rmtree(work / name, ignore_errors=True)
        (new, _), *replay = shares.items()
        ratio = replay[0][1] if replay else 0.0
        old = self.texts[self.scale.old]
        held_out = {} if new == self.scale.old else {"replay_eval_dataset": old["held_out"]}
        replay_dataset = None if ratio == 0 else old["train"] if replayed is None else replayed()
        trainer = CPTTrainer(
            self._model(chain, start),
            self._arguments(chain, work / name, steps, ratio, phases, start, self._is_start(chain, name)),
            train_dataset=self.texts[new]["train"],
            replay_dataset=replay_dataset,
            eval_dataset=self.texts[new]["held_out"],
            processing_class=AutoTokenizer.from_pretrained(self.folder / "tokenizer"),
            **held_out,
        )
        trainer.remove_callback(ShortPrinter)
        if chain.method.endswith(MICRO):
            balance_over_micro_batches(trainer)
        ask = partial(
            accuracies, trainer.model, trainer.processing_class, self.folder / "tasks", self.scale.batch_size
        )
        is_first = start is None and not self.scale.is_upcycled
        before, tasks_before = ({}, {}) if is_first else (trainer.evaluate(), ask())
        trainer.train()
        if trainer.state.global_step < steps:
            raise InterruptedError(f"{chain.name} {name} was stopped after step {trainer.state.global_step}")
        after = trainer.evaluate()
        record = {
            "steps": steps,
            "loss": {text: after[key] for text, key in self._keys(new).items()},
            "loss_before": {text: before[key] for text, key in self._keys(new).items() if key in before},
            "mri": [entry["mri"] for entry in trainer.state.log_history if "mri" in entry],
            "tasks": ask(),
            "tasks_before": tasks_before,
            "parameters": trainer.model.num_parameters(),
            "active_parameters": active_parameters(trainer.model),
        }
        if chain.method != "dense":
            record["routing"] = self._routing(trainer.model, work, name, start)
        write_json(done, record)
        del trainer
        gc.collect()
        return record

    def _is_start(self, chain: Chain, name: str) -> bool:
        """Whether the weights of a run are needed once more."""
        probes = [continued(chain.new, self.scale.ratios(chain.new)[0])]
        is_probed = chain.method in self.scale.models_of(DRIFT, chain.new)
        return name in (PRETRAINED, DECAYED, *(probes if is_probed else ()))

    def _keys(self, new: str) -> dict[str, str]:
        return {new: "eval_new_loss"} | ({} if new == self.scale.old else {self.scale.old: "eval_replay_loss"})

    def _model(self, chain: Chain, start: str | None) -> Any:
        if start is not None:
            (last,) = (self.folder / "work" / chain.folder / start).glob("checkpoint-*")
            return AutoModelForCausalLM.from_pretrained(last, local_files_only=True)
        if self.scale.is_upcycled:
            return AutoModelForCausalLM.from_pretrained(self._upcycled(chain), local_files_only=True, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        set_seed(chain.seed)
        fields = {**self.scale.fields, "vocab_size": len(tokenizer), **ids}
        return AutoModelForCausalLM.from_config(config_of(chain.method, **fields))

    def _upcycled(self, chain: Chain) -> Path:
        """The base, or a mixture made of it, whose routers the seed draws."""
        if chain.method == "dense":
            return Path(self.base)
        made, to = self.folder / "work" / chain.folder / "upcycled", chain.method.removeprefix("pb-")
        if not made.is_dir():
            options = UpcycleOptions(seed=chain.seed, router_std=4.0 if to == "granular" else None)
            upcycle(self.base, made, to, options)
        return made

    def _arguments(
        self,
        chain: Chain,
        folder: Path,
        steps: int,
        ratio: float,
        phases: Mapping[str, float] | None,
        start: str | None,
        keeps_weights: bool,
    ) -> CPTConfig:
        has_bias = config_of(chain.method).router_type == "bias_topk"
        blocks = self.scale.micro_blocks if chain.method.endswith(MICRO) else self.scale.batch_size
        return CPTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=blocks,
            gradient_accumulation_steps=self.scale.batch_size // blocks,
            per_device_eval_batch_size=self.scale.batch_size,
            max_length=self.scale.max_length,
            packing="concat",
            replay_ratio=ratio,
            learning_rate=self.scale.learning_rate,
            keep_optimizer_state=start is not None,
            eval_on_start=False,  # `_run` does it where there is something to know
            save_strategy="steps" if keeps_weights else "no",
            save_steps=steps,
            logging_steps=1,
            seed=chain.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.device == "cpu",
            bf16=self.device == "cuda",
            dataloader_pin_memory=self.device == "cuda",
            **(phases or {}),
            **({"router_bias_update_rate": self.scale.router_bias_update_rate} if has_bias else {}),
        )

    def _trace(self, model: Any, folder: Path, texts: Mapping[str, Dataset], tokens: int) -> RoutingTrace:
        options = {"batch_size": self.scale.batch_size, "max_length": self.scale.max_length, "progress": False}
        return collect_routing(model.eval(), texts, folder, name=folder.name, tokens_per_domain=tokens, **options)

    def _routing(self, model: Any, work: Path, name: str, start: str | None) -> dict[str, Any]:
        """MRI in evaluation and loads on every text, by layer; saturation on the old text against the start."""
        texts = {text: sides["held_out"] for text, sides in self.texts.items()}
        trace = self._trace(model, work / name / "trace", texts, TRACED_TOKENS)
        first = {} if start is None else {"start": RoutingTrace.open(work / start / "trace")}
        found = analyse_traces(first | {name: trace})
        kept = {"mri": {}, "load": {}}
        for text in texts:
            for metric, values in kept.items():
                values[text] = found["metrics"][name][text][metric]
        saturation = None if start is None else found["saturation"][name][self.scale.old]
        return kept | {"saturation": saturation}

    def _drifted(self, work: Path, probe: str) -> Callable[[], Dataset]:
        """The half of the old text whose experts changed most in a run without replay."""

        def choose() -> Dataset:
            train = self.texts[self.scale.old]["train"]
            count = min(PARTS, len(train))
            parts = {f"{part:02}": train.shard(count, part, contiguous=True) for part in range(count)}
            traces = {}
            for run in (PRETRAINED, probe):
                (last,) = (work / run).glob("checkpoint-*")
                model = AutoModelForCausalLM.from_pretrained(last, local_files_only=True).to(self.device)
                traces[run] = self._trace(model, work / run / "parts", parts, TRACED_TOKENS // 8)
            kept = analyse_traces(traces)["saturation"][probe]
            order = sorted(parts, key=lambda part: statistics.fmean(kept[part]))
            return datasets.concatenate_datasets([parts[part] for part in order[: (count + 1) // 2]])

        return choose


def prepare(scale: Scale, folder: Path, text: str | None, base: str | None = None) -> dict[str, Any]:
    """Tokenizer, that of a base if there is one, tokens of every text, tasks; made once, returns tokens and bytes.

    Documents lie in the order of their files, so that parts of them are about something.
    """
    facts = folder / "text.json"
    if facts.is_file():
        return read_json(facts)
    if text is None:
        corpus = build_python_corpus(
            max_characters_per_domain=scale.characters,
            held_out_fraction=HELD_OUT_FRACTION,
            cache_dir=folder / "corpus",
        )
        sides = {name: {side: rows.sort("path") for side, rows in corpus[name].items()} for name in scale.texts}
    else:
        sides = {}
        for name in scale.texts:
            found = load_text_dataset(str(Path(text) / name))
            if scale.characters is not None:
                found = found.shuffle(seed=0)
                ends = np.cumsum([len(row) for row in found["text"]])
                found = found.select(range(1 + int(np.searchsorted(ends[:-1], scale.characters))))
            found = found.train_test_split(HELD_OUT_FRACTION, seed=0, shuffle=True)
            sides[name] = {"train": found["train"], "held_out": found["test"]}
    if base is None:
        train = (row for name in scale.texts[:2] for row in sides[name]["train"]["text"])
        tokenizer = train_byte_level_bpe(train, scale.vocab_size, model_max_length=scale.max_length, progress=False)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {}
    for name in scale.texts:
        for side, rows in sides[name].items():
            if side == "held_out":  # no document has fewer than 64 tokens
                rows = rows.shuffle(seed=0).select(range(min(len(rows), scale.held_out_tokens // 64)))
            tokens = tokenize_documents(rows, tokenizer)
            if side == "held_out":  # none of it may be most of it
                count = [row for row, ids in enumerate(tokens["input_ids"]) if 4 * len(ids) <= scale.held_out_tokens]
                if not count:
                    raise ValueError(f"no document of {name} is short enough to be held out: give shorter ones.")
                rows, tokens = rows.select(count), tokens.select(count)
                ends = np.cumsum(list(map(len, tokens["input_ids"])))
                count = range(1 + int(np.searchsorted(ends[:-1], scale.held_out_tokens)))
                rows, tokens = rows.select(count), tokens.select(count)
                write_task(continuations(rows["text"], scale.questions), f"continue_{name}", folder / "tasks")
            tokens.save_to_disk(str(folder / "text" / name / side))
            sizes[f"{name}/{side}"] = {
                "tokens": sum(map(len, tokens["input_ids"])),
                "bytes": sum(len(row.encode()) for row in rows["text"]),
            }
    write_json(facts, sizes)
    return sizes


@dataclass(frozen=True)
class Evidence:
    """The chains of one seed, by model, and one shift. A KeyError of a measure says that a model was not run."""

    scale: Scale
    chains: Mapping[str, Runs]
    new: str
    begun: Sequence[str] = ()  # models of which any seed began the shift; none: as planned
    seeds: Sequence[Mapping[str, Runs]] = ()  # the chains of all seeds, of which lines are fitted

    def asked_of(self, models: Sequence[str]) -> list[str]:
        """Those that a mean is taken of. Raises KeyError if there are none."""
        if not (some := [model for model in models if model in (self.begun or models)]):
            raise KeyError(models[0])
        return some

    @property
    def mixtures(self) -> list[str]:
        """All mixtures that were asked for."""
        return self.asked_of(MIXTURES)

    @property
    def pb(self) -> list[str]:
        """The penalty-balanced ones of them."""
        return self.asked_of(PB)

    @property
    def sb(self) -> list[str]:
        """The Sinkhorn-balanced ones of them."""
        return self.asked_of(SB)

    @property
    def plain(self) -> str:
        """The run without replay."""
        return continued(self.new, self.scale.ratios(self.new)[0])

    def longest(self, model: str) -> str:
        """The run without replay that goes on longest."""
        is_long = model in self.scale.models_of(LONG, self.new)
        return continued(self.new, self.scale.ratios(self.new)[0], LONG if is_long else "")

    def replayed(self, how: str = "") -> str:
        """The run with the most replay, or a control of it."""
        return continued(self.new, self.scale.ratios(self.new)[-1], how)

    def balance(self, model: str, *mri: float) -> list[float]:
        """MRI x E/K of each MRI. Raises KeyError for a dense model."""
        experts, chosen = experts_of(model)
        if not experts:
            raise KeyError(model)
        return [normalized_imbalance(value, experts, chosen) for value in mri]

    def curve(self, model: str, run: str) -> list[float]:
        """MRI x E/K of each step in training, the mean over layers."""
        return self.balance(model, *self.chains[model][run]["mri"])

    def around(self, model: str, run: str) -> ImbalanceShift:
        """The balance around the shift to a run."""
        start = DECAYED if run.endswith(DECAYED) else PRETRAINED
        return imbalance_around_shift(self.curve(model, start), self.curve(model, run), baseline=MEAN_STEPS)

    def peak(self, model: str, run: str) -> float:
        """Highest mean of 5 steps soon after the shift to a run."""
        return imbalance_around_shift([1.0], self.curve(model, run)[:PEAK_STEPS]).peak

    def spike(self, model: str, run: str | None = None) -> float:
        """How far the peak is above the highest of as many steps before the shift, as a share of it."""
        before = self.curve(model, PRETRAINED)[-PEAK_STEPS:]
        return self.peak(model, run or self.plain) / imbalance_around_shift([1.0], before).peak - 1

    def steps_to_return(self, model: str, level_of: str) -> int | None:
        """Steps after the shift until a model stays below the mean of another over the run; None: not in this run.

        Both in training, without replay; of the model the mean over the last 20 steps since the shift.
        """
        curve = self.curve(model, self.longest(model))
        smooth = [statistics.fmean(curve[max(0, end - MEAN_STEPS) : end]) for end in range(1, len(curve) + 1)]
        return recovery_step(smooth, 0, statistics.fmean(self.curve(level_of, self.longest(level_of))))

    def arm(self, name: str, among: Sequence[str]) -> list[str]:
        """Those models that the arm was run with. Raises KeyError if there are none."""
        models = [model for model in among if model in self.scale.models_of(name, self.new)]
        if not models:
            raise KeyError(name)
        return models

    def loss(self, model: str, run: str, text: str | None = None) -> float:
        """Held-out loss at the end of a run, on the new text if none is named."""
        return self.chains[model][run]["loss"][text or self.new]

    def forgets(self, model: str, run: str) -> float:
        """Rise of the held-out loss on the old text."""
        record, old = self.chains[model][run], self.scale.old
        return record["loss"][old] - record["loss_before"][old]

    def unlearns(self, model: str, run: str) -> float:
        """How far the share of right choices falls in tasks about the old text and about what it may tell.

        Raises KeyError where nothing was asked.
        """
        record = self.chains[model][run]
        names = {f"continue_{self.scale.old}", "capitals"} & record.get("tasks", {}).keys()
        if not names:
            raise KeyError("tasks")
        return statistics.fmean(record["tasks_before"][name] - record["tasks"][name] for name in names)

    def asked(self, model: str) -> float:
        """MRI x E/K in evaluation on the old text, before the shift."""
        return statistics.fmean(self.balance(model, *self.chains[model][PRETRAINED]["routing"]["mri"][self.scale.old]))

    def modes(self, model: str) -> float:
        """How far the balance in evaluation on the old text is from that at the end of training on it."""
        return abs(self.asked(model) - statistics.fmean(self.curve(model, PRETRAINED)[-MEAN_STEPS:]))

    def saturation(self, model: str) -> list[float]:
        """Share of the experts of a token of the old text that the run without replay kept, by layer."""
        return self.chains[model][self.plain]["routing"]["saturation"]

    def features(self, model: str, run: str) -> list[float]:
        """What might predict forgetting: spike, share of experts that changed, overlap of the texts' loads before."""
        loads = self.chains[model][PRETRAINED]["routing"]["load"]
        layers = zip(loads[self.scale.old], loads[self.new], strict=True)
        overlap = statistics.fmean(float(np.minimum(*layer).sum()) for layer in layers)
        changed = 1 - statistics.fmean(self.chains[model][run]["routing"]["saturation"])
        return [self.spike(model, run), changed, overlap]

    def points(self, chains: Mapping[str, Runs]) -> list[tuple[str, list[float], float]]:
        """Architecture, features and forgetting of the runs of a seed; KeyError where one is missing."""
        runs = [self.plain, self.replayed()]
        one = replace(self, chains=chains)
        return [(m, [1.0, *one.features(m, run)], one.forgets(m, run)) for m in MIXTURES for run in runs]

    def prediction(self) -> float:
        """R2 over the runs of this seed, predicted by a line through all seeds' runs of the other architectures."""
        rows, known = self.points(self.chains), []
        for chains in self.seeds or [self.chains]:
            with suppress(KeyError):
                known += self.points(chains)
        errors = []
        for left_out in MIXTURES:
            x, y = zip(*((x, y) for model, x, y in known if model != left_out), strict=True)
            line = np.linalg.lstsq(np.array(x), np.array(y), rcond=None)[0]
            errors += [y - float(np.dot(x, line)) for model, x, y in rows if model == left_out]
        spread = np.var([y for *_, y in rows])
        return 1 - float(np.mean(np.square(errors)) / spread)


PB, SB = ("pb-granular", "pb-switch"), ("sb-granular", "sb-switch")
MIXTURES = (*PB, *SB, "lf-granular")


def _mean(models: Sequence[str], value: Callable[[str], float]) -> float:
    return statistics.fmean(map(value, models))


def _steps_to_return(evidence: Evidence, model: str) -> float:
    steps = evidence.steps_to_return(model, model.replace("pb", "sb"))
    if steps is not None:
        return float(steps)
    told = len(evidence.chains[model][evidence.longest(model)]["mri"])
    return NEVER if told >= CLAIMS["return_steps"]["margin"] else math.inf


OF_THE_START = ("sinkhorn_high", "sinkhorn_modes", "batch_loss")  # which all shifts share
# The number that each claim is about, of one seed.
MEASURES: dict[str, Callable[[Evidence], float]] = {
    "spike": lambda e: _mean(e.pb, e.spike),
    "return": lambda e: (
        _mean(e.pb, lambda m: e.around(m, e.longest(m)).after) - _mean(e.sb, lambda m: e.around(m, e.longest(m)).after)
    ),
    "return_steps": lambda e: _mean(e.pb, lambda m: _steps_to_return(e, m)),
    "sinkhorn_flat": lambda e: _mean(e.sb, e.spike) - _mean(e.pb, e.spike),
    "sinkhorn_high": lambda e: (
        _mean(e.sb, lambda m: e.around(m, e.plain).before) - _mean(e.pb, lambda m: e.around(m, e.plain).before)
    ),
    "sinkhorn_modes": lambda e: _mean(e.sb, e.modes) - _mean(e.pb, e.modes),
    "decayed_start": lambda e: _mean(
        e.arm(DECAYED, e.pb), lambda m: e.peak(m, e.replayed(DECAYED)) / e.peak(m, e.replayed()) - 1
    ),
    "decayed_forgetting": lambda e: _mean(
        e.arm(DECAYED, MODELS),
        lambda m: e.loss(m, e.replayed(), e.scale.old) - e.loss(m, e.replayed(DECAYED), e.scale.old),
    ),
    "decayed_new": lambda e: _mean(
        e.arm(DECAYED, MODELS), lambda m: e.loss(m, e.replayed()) / e.loss(m, e.replayed(DECAYED)) - 1
    ),
    "forgetting": lambda e: _mean(e.mixtures, lambda m: e.forgets(m, e.plain)) - e.forgets("dense", e.plain),
    "forgetting_replay": lambda e: (
        _mean(e.mixtures, lambda m: e.forgets(m, e.replayed())) - e.forgets("dense", e.replayed())
    ),
    "union_new": lambda e: _mean(
        e.arm(UNION, MIXTURES), lambda m: e.loss(m, e.replayed()) / e.loss(m, f"{e.new}-{UNION}") - 1
    ),
    "union_old": lambda e: _mean(
        e.arm(UNION, MIXTURES),
        lambda m: e.loss(m, e.replayed(), e.scale.old) / e.loss(m, f"{e.new}-{UNION}", e.scale.old) - 1,
    ),
    "granular": lambda e: _mean(
        ("pb", "sb"), lambda r: e.loss(f"{r}-granular", e.replayed()) - e.loss(f"{r}-switch", e.replayed())
    ),
    "first_layers": lambda e: _mean(e.mixtures, lambda m: e.saturation(m)[0] - statistics.fmean(e.saturation(m)[1:])),
    "free_balance": lambda e: e.spike("lf-granular") - e.spike("pb-granular"),
    "free_loss": lambda e: e.loss("lf-granular", e.replayed()) / e.loss("pb-granular", e.replayed()) - 1,
    "batch_loss": lambda e: (
        e.loss("pb-granular", PRETRAINED, e.scale.old) - e.loss(f"pb-granular{MICRO}", PRETRAINED, e.scale.old)
    ),
    "batch_spike": lambda e: e.spike("pb-granular") - e.spike(f"pb-granular{MICRO}"),
    "batch_forgetting": lambda e: e.forgets("pb-granular", e.plain) - e.forgets(f"pb-granular{MICRO}", e.plain),
    "downstream": lambda e: _mean(e.mixtures, lambda m: e.unlearns(m, e.plain)) - e.unlearns("dense", e.plain),
    "downstream_replay": lambda e: (
        _mean(e.mixtures, lambda m: e.unlearns(m, e.replayed())) - e.unlearns("dense", e.replayed())
    ),
    "prediction": Evidence.prediction,
    "drift_replay": lambda e: _mean(
        e.arm(DRIFT, MIXTURES), lambda m: e.forgets(m, e.replayed(DRIFT)) - e.forgets(m, e.replayed())
    ),
}


def judged(values: Sequence[float], kind: str, margin: float = 0.0) -> dict[str, Any]:
    """Mean, interval and verdict of a claim. values: one for each seed, paired already.

    Fewer than LEAST_SEEDS decide nothing. `seeds_needed` of what is undecided: about how many decide it if the mean is
    what it seems, None for too many.
    """
    if math.inf in values:  # a time that is longer than the runs are, of unknown length
        return {"mean": None, "low": None, "high": None, "seeds": len(values), "verdict": "undecided"}
    confidence = 2 * CONFIDENCE - 1 if kind == "within" else CONFIDENCE
    mean, half = t_interval(values, confidence)
    found: dict[str, Any] = {"mean": mean, "low": None, "high": None, "seeds": len(values), "seeds_needed": None}
    if half is None:
        return found | {"verdict": "undecided"}
    low, high = mean - half, mean + half
    is_enough = len(values) >= LEAST_SEEDS
    sides = {  # of the interval: what confirms, what refutes, and how far the mean is from what decides
        "more": (low > 0, high < 0, abs(mean)),
        "less": (high < 0, low > 0, abs(mean)),
        "at_most": (high < margin, low > margin, abs(mean - margin)),
        "within": (-margin < low and high < margin, low > margin or high < -margin, abs(abs(mean) - margin)),
    }
    confirmed, refuted, distance = sides[kind]
    verdict = "undecided" if not is_enough else "confirmed" if confirmed else "refuted" if refuted else "undecided"
    if verdict == "undecided":
        found["seeds_needed"] = seeds_needed(statistics.stdev(values), len(values), distance, confidence)
    return found | {"low": low, "high": high, "verdict": verdict}


def summary(scale: Scale, chains: Chains, facts: Mapping[str, Any], made_with: Mapping[str, str]) -> dict[str, Any]:
    """What the page, the plot and the table are made of: verdicts by shift, numbers of every run, curves.

    A claim is judged over those seeds in which all its runs are finished; what is about the start alone is judged
    once. facts: tokens and bytes of the texts.
    """
    seeds = sorted({seed for found in chains.values() for seed in found})
    claims, back = [], {}
    for new in scale.shifts:
        by_seed = [{model: runs[seed] for model, runs in chains.items() if seed in runs} for seed in seeds]
        plain = continued(new, scale.ratios(new)[0])
        begun = [model for model, by_seed in chains.items() if any(plain in runs for runs in by_seed.values())]
        if not begun:
            continue
        evidence = [Evidence(scale, found, new, begun, by_seed) for found in by_seed]
        for name, claim in CLAIMS.items():
            if name in OF_THE_START and claims and claims[0]["shift"] != new:
                continue
            if values := _where_finished(evidence, MEASURES[name]):
                found = judged(values, claim["kind"], claim.get("margin", 0.0))
                values = [None if value == math.inf else value for value in values]  # JSON has no infinity
                claims.append({"claim": name, "shift": new, **claim, **found, "values": values})
        for model in PB:
            steps = _where_finished(evidence, lambda e, m=model: e.steps_to_return(m, m.replace("pb", "sb")))
            if steps:
                back.setdefault(new, {})[model] = steps
    return {
        "machine": dict(made_with),
        "scale": asdict(scale),
        "text": dict(facts),
        "seeds": seeds,
        "claims": claims,
        "steps_to_return": back,
        "models": _models(scale, chains),
        "runs": _rows(scale, chains, facts, made_with),
        "curves": _curves(scale, chains),
    }


def _where_finished(evidence: Sequence[Evidence], measure: Callable[[Evidence], Any]) -> list[Any]:
    """The numbers of those seeds whose runs are there."""
    values = []
    for part in evidence:
        try:
            values.append(measure(part))
        except KeyError:  # of a run that is not finished, or of a model that was not asked for
            continue
    return values


def _rows(
    scale: Scale, chains: Chains, facts: Mapping[str, Any], made_with: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each run and text, in nats a token and bits a byte, of held-out documents."""
    rows = []
    for model, by_seed in chains.items():
        for seed, found in by_seed.items():
            for run, record in found.items():
                for text, loss in record["loss"].items():
                    size = facts.get(f"{text}/held_out")
                    bits = None if size is None else loss / math.log(2) * size["tokens"] / size["bytes"]
                    row = {"model": model, "seed": seed, "run": run, "text": text, "loss": loss, "bits_per_byte": bits}
                    row |= {"before": record["loss_before"].get(text), "steps": record["steps"]}
                    row["tokens"] = record["steps"] * scale.batch_size * scale.max_length
                    row |= {key: record[key] for key in ("parameters", "active_parameters")}
                    row |= {key: made_with.get(key) for key in ("commit", "settings")}
                    rows.append(row)
    return rows


MODELS_TOLD = """before, peak, after: MRI x E/K in training, the mean of 20 steps, the highest of 5 within 50 steps of
the shift, the last 20; asked: in evaluation on the old text before the shift; kept: share of a token's experts that a
run without replay kept on the old text; old: held-out loss before the shift; forgets: its rise, also with replay; new:
loss on the new text; losses in nats; unlearns: by how much the share of right choices in downstream tasks about the
old text falls, also with replay"""
# Of one model and shift, in the order of the table.
NUMBERS: dict[str, Callable[[Evidence, str], float]] = {
    "before": lambda e, m: e.around(m, e.plain).before,
    "peak": lambda e, m: e.peak(m, e.plain),
    "after": lambda e, m: e.around(m, e.plain).after,
    "asked": lambda e, m: e.asked(m),
    "kept": lambda e, m: statistics.fmean(e.saturation(m)),
    "first layer": lambda e, m: e.saturation(m)[0],
    "old": lambda e, m: e.loss(m, PRETRAINED, e.scale.old),
    "forgets": lambda e, m: e.forgets(m, e.plain),
    "with replay": lambda e, m: e.forgets(m, e.replayed()),
    "new": lambda e, m: e.loss(m, e.plain),
    "new, replay": lambda e, m: e.loss(m, e.replayed()),
    "unlearns": lambda e, m: e.unlearns(m, e.plain),
    "unl. replay": lambda e, m: e.unlearns(m, e.replayed()),
}


def _models(scale: Scale, chains: Chains) -> list[dict[str, Any]]:
    """By shift and model: mean and half width over seeds of `NUMBERS`."""
    rows = []
    for new in scale.shifts:
        for model, by_seed in chains.items():
            plain = continued(new, scale.ratios(new)[0])
            evidence = [Evidence(scale, {model: runs}, new) for runs in by_seed.values() if plain in runs]
            if not evidence:
                continue
            row: dict[str, Any] = {"shift": new, "model": model}
            for name, number in NUMBERS.items():
                if values := _where_finished(evidence, lambda e, number=number, model=model: number(e, model)):
                    row[name] = list(t_interval(values))
            rows.append(row)
    return rows


def _curves(scale: Scale, chains: Chains) -> dict[str, dict[str, list[float]]]:
    """By shift and model: MRI x E/K of each step without replay, the mean over seeds, behind the end of the start."""
    found: dict[str, dict[str, list[float]]] = {}
    for new in scale.shifts:
        for model, by_seed in chains.items():
            parts = [Evidence(scale, {model: runs}, new) for runs in by_seed.values()]
            rows = _where_finished(
                parts if model != "dense" else [],
                lambda e, m=model: e.curve(m, PRETRAINED)[-MEAN_STEPS:] + e.curve(m, e.plain),
            )
            if rows:
                found.setdefault(new, {})[model] = [round(value, 4) for value in np.mean(rows, axis=0).tolist()]
    return found


def results_text(results: Mapping[str, Any]) -> str:
    """The verdicts, a line each, what each model did, and how long penalty-balanced mixtures took to come back."""
    rows = []
    for claim in results["claims"]:
        margin = f" {claim['margin']:g}" if "margin" in claim else ""
        interval = "" if claim["low"] is None else f"[{claim['low']:+.3f}, {claim['high']:+.3f}]"
        needed = f", {claim['seeds_needed']} seeds" if claim.get("seeds_needed") else ""
        rows.append(
            {
                "shift": claim["shift"],
                "claim": claim["says"],
                "test": claim["kind"] + margin,
                "mean": "" if claim["mean"] is None else f"{claim['mean']:+.3f}",
            }
            | {"interval": interval, "unit": claim["unit"], "seeds": str(claim["seeds"])}
            | {"verdict": claim["verdict"] + needed}
        )
    scale = Scale(**results["scale"])
    lines = [text_table(rows)] if rows else ["No seed is finished."]
    for new, found in results["steps_to_return"].items():
        for model, values in found.items():
            told = ", ".join("not in this run" if value is None else str(value) for value in values)
            steps = scale.long_steps if model in scale.models_of(LONG, new) else scale.continued_steps
            lines.append(f"{new}: steps until {model} stays below the level of its Sinkhorn twin, of {steps}: {told}")
    table, shown = [], [name for name in NUMBERS if any(name in row for row in results["models"])]
    for row in results["models"]:
        cells = {name: Estimate(*row[name]).text(1.0, 3) if name in row else "" for name in shown}
        table.append({"shift": row["shift"], "model": row["model"]} | cells)
    if table:
        lines += ["", text_table(table), MODELS_TOLD]
    return "\n".join(lines)


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Balance around each shift above, held-out loss on the old text with and without replay below."""
    plot = plotting(path)
    if plot is None or not results["runs"]:
        return
    begun = {row["shift"] for row in results["models"]}
    shifts = {new: shift for new, shift in results["scale"]["shifts"].items() if new in begun}
    if not shifts:
        return
    figure, axes = plot.subplots(2, len(shifts), figsize=(6 * len(shifts), 8), squeeze=False)
    for column, (new, shift) in enumerate(shifts.items()):
        for model, curve in results["curves"].get(new, {}).items():
            axes[0][column].plot(range(-MEAN_STEPS, len(curve) - MEAN_STEPS), curve, label=model)
        axes[0][column].axvline(0, color="grey", linewidth=0.8)
        axes[0][column].set(title=f"to {new}", xlabel="steps after the shift", ylabel="MRI x E/K")
        if new in results["curves"]:
            axes[0][column].legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3)
        old, bars = results["scale"]["old"], {}
        for row in results["runs"]:
            for ratio in shift["ratios"]:
                if row["run"] == continued(new, ratio) and row["text"] == old:
                    bars.setdefault(f"{ratio:g} replay", {}).setdefault(row["model"], []).append(
                        row["loss"] - row["before"]
                    )
        grouped_bars(axes[1][column], list(dict.fromkeys(row["model"] for row in results["runs"])), bars)
        axes[1][column].set(ylabel=f"forgetting of {old}, nats")
        axes[1][column].tick_params(axis="x", rotation=30)
        axes[1][column].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plot.close(figure)


@dataclass
class RobustnessArguments:
    """How much to run, where; the rest is the plan."""

    setting: str = HfArg(default="small", help=f"Size of the runs: {', '.join(SETTINGS)}.")
    methods: list[str] = HfArg(default_factory=lambda: list(MODELS), help="Models; a claim needs its own.")
    seeds: int | None = HfArg(default=None, help="Chains of each model, if not the setting's.")
    output_dir: str = HfArg(default="runs/router-robustness", help="Folder; finished chains are kept.")
    text: str | None = HfArg(default=None, help="Folder with a folder of documents for each text of the setting.")
    base: str | None = HfArg(default=None, help="Folder of the dense model that the setting continues and upcycles.")
    workers: int = HfArg(default=2, help="Processes, one chain each at a time; 1: this process does it all.")
    device: str = HfArg(default="cpu", help="cpu or cuda.")
    minutes: float | None = HfArg(default=None, help="No chain begins later than this; the same command goes on.")
    commit: str | None = HfArg(default=None, help="Of the code, for the rows; unset: git is asked.")


def found_runs(root: Path, seeds: int, models: Sequence[str], shifts: Sequence[str]) -> Chains:
    """The finished runs of all chains, also of those that are not finished themselves."""
    found: dict[str, dict[int, Runs]] = {}
    for chain in (Chain(model, seed, new) for model in models for seed in range(seeds) for new in shifts):
        runs = found.setdefault(chain.method, {}).setdefault(chain.seed, {})
        done = root / "runs" / f"{chain.name}.json"
        if done.is_file():
            runs |= read_json(done)["runs"]
        for part in sorted((root / "work" / chain.folder).glob("*/record.json")):
            runs[part.parent.name] = read_json(part)
    whole = {model: {seed: runs for seed, runs in by_seed.items() if runs} for model, by_seed in found.items()}
    return {model: by_seed for model, by_seed in whole.items() if by_seed}


def compare_main(argv: Sequence[str]) -> None:
    """Prepare the text, run the chains, judge, write and print what came out."""
    (args,) = parse_arguments((RobustnessArguments,), argv, program=PROGRAM, description=__doc__)
    check_names("--device", [args.device], ("cpu", "cuda"))
    check_request(args, SETTINGS, MODELS)
    scale = SETTINGS[args.setting]
    if (args.base is None) == scale.is_upcycled:
        told = "--base is missing: name" if scale.is_upcycled else f"--base is nothing that {args.setting} reads: drop"
        raise ValueError(f"{told} the folder of a dense model, as factbook.py makes one.")
    if args.text is None and not scale.has_text:
        raise ValueError(f"--text is missing: name a folder with the folders {', '.join(scale.texts)}.")
    folder = open_folder(args.output_dir, {"setting": args.setting, "scale": asdict(replace(scale, seeds=0))})
    quiet_process()
    facts, seeds = prepare(scale, folder.root, args.text, args.base), args.seeds or scale.seeds
    if (made_with := folder.read("machine.json")) is None:
        made_with = machine_facts(torch.device(args.device), args.commit)
        folder.write("machine.json", made_with)
    chains = {
        new: [Chain(model, seed, new) for seed in range(seeds) for model in args.methods] for new in scale.shifts
    }
    with (
        tqdm(total=sum(map(len, chains.values())), desc="chains", disable=None) as bar,
        Crew(
            folder, args.workers, Worker, scale, folder.root, args.device, args.base, until=end_of(args.minutes)
        ) as crew,
    ):
        try:
            for of_shift in chains.values():
                for name, record in crew.records(of_shift, bar).items():
                    if "error" in record:
                        print(f"{name} failed, and is tried again by the same command: {record['error']}")
        except TimeoutError:
            tell_rest(args, is_all=False)
    settings = json.dumps([folder.settings, CLAIMS], sort_keys=True)
    made_with |= {"settings": hashlib.sha256(settings.encode()).hexdigest()[:12]}
    found = found_runs(folder.root, seeds, args.methods, list(chains))
    results = summary(scale, found, facts, made_with)
    write_results(folder.root, results, results["runs"], draw, results_text)


PROGRAM, GUIDE = "router_robustness.py", "[how robust is your router](../../router_robustness.md)"
PROGRAMS = {"compare": compare_main, "page": lambda argv: write_page(argv, PROGRAM, GUIDE, results_text)}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `compare`, the first, or `page`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
