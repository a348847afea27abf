"""What the quickstart runs: sizes from a small fixed table, and six training runs in order.

Two models, a mixture of experts and its dense twin, learn the old domain; each is then continued on the new one twice,
with replay of the old and without. Shares follow paper 1 (arXiv 2503.05029): continuing takes half the steps of
pre-training, replay is 30 % of a batch. Sizes and rates are ours, chosen on two CPU cores.

Text, tokenizer and tokens of the quickstart, made once and kept in its output folder. Source: ours.

Run one stage of the quickstart with `CPTTrainer`: make or continue a model, save it, keep its log. Source: ours.

From the logs of the six runs to results.json: one row per run, its curves, and the table that is printed.

Losses are held-out, in nats per token. MRI is the mean over layers, each layer's MRI as in paper 1, Eq. 1.

The quickstart's HTML page, made of results.json and nothing else. Source: ours.

How the quickstart's mixtures of experts route held-out text: the comparison that `hf-moe-cpt analyze` makes.

The first checkpoint is the pre-trained model, the others are what became of it with and without replay. Traces go to
routing/traces/, the page with everything to routing/report.html; results.json keeps what the quickstart's own page
shows. Source: ours; the questions are those of paper 1 (arXiv 2503.05029).
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_moe_cpt import __version__
from hf_moe_cpt.data.python_corpus import (
    Corpus,
    build_python_corpus,
    load_corpus,
    load_folder_corpus,
    save_corpus,
    train_byte_level_bpe,
)
from hf_moe_cpt.data.text import tokenize_documents
from hf_moe_cpt.evaluation.resumable import ResumableFolder
from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.reports.charts import Mark, Series, line_chart
from hf_moe_cpt.reports.tables import Section, write_report
from hf_moe_cpt.routing.compare import analyse_traces
from hf_moe_cpt.routing.metrics import ContinualOutcome, imbalance_around_shift, imbalance_curve
from hf_moe_cpt.routing.report import write_routing_report
from hf_moe_cpt.routing.trace import collect_routing
from hf_moe_cpt.trainers.common.checkpointing import BYTES_PER_MOMENT_PAIR, last_whole_checkpoint
from hf_moe_cpt.trainers.common.metrics import ShortPrinter
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


REPLAY_RATIO = 0.3
HELD_OUT_FRACTION = 0.05
CHARACTERS_PER_TOKEN = 4  # a little more than a tokenizer of this size needs, so that no text is seen twice
LEAST_CHARACTERS, MOST_CHARACTERS = 2_000_000, 40_000_000  # of a domain
LEAST_STEPS = 4
MOE, DENSE = "moe", "dense"


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs with models of one size."""

    steps: int  # optimizer steps of pre-training
    batch_size: int  # blocks of an optimizer step
    max_length: int  # tokens of a block
    learning_rate: float  # peak; the schedule's constant rate is midway to the minimum, a tenth of the peak
    vocab_size: int  # of the tokenizer
    held_out_tokens: int  # of each domain, evaluated EVALUATIONS times in a run


# By the last part of a preset's name.
SCALES = {
    "tiny": Scale(
        steps=360, batch_size=8, max_length=128, learning_rate=3e-3, vocab_size=4096, held_out_tokens=12_288
    ),
    "2b": Scale(
        steps=600, batch_size=16, max_length=1024, learning_rate=3e-4, vocab_size=16_384, held_out_tokens=131_072
    ),
}
DENSE_TWINS = {"tiny": "dense-tiny", "2b": "dense-570m"}
MOE_PRESETS = tuple(name for name in PRESETS if not name.startswith("dense"))
EVALUATIONS = 3  # of held-out text during a run, the last one at its end
# Warm-up is longer than the paper's 1 %, which would be two steps. No anneal: the run ends in the constant phase.
PRETRAINING_PHASES = {
    "warmup_fraction": 0.05,
    "cooldown_fraction": 0.70,
    "constant_fraction": 0.25,
    "anneal_fraction": 0.0,
}


@dataclass(frozen=True)
class Stage:
    """One training run."""

    name: str
    model: str  # MOE or DENSE
    steps: int
    starts_from: str | None = None  # name of the stage whose model is continued; None: a fresh model
    replay_ratio: float = 0.0

    @property
    def is_pretraining(self) -> bool:
        """Whether the stage learns the old domain from scratch."""
        return self.starts_from is None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a quickstart, besides the machine and the text."""

    preset: str
    dense_preset: str
    scale: Scale
    seed: int
    device: str
    data_dir: str | None

    @property
    def stages(self) -> list[Stage]:
        """The six runs in the order in which they are made."""
        steps = self.scale.steps
        first = [Stage(f"{model}-pretrained", model, steps) for model in (MOE, DENSE)]
        percent = f"{100 * REPLAY_RATIO:.0f}"
        return first + [
            Stage(f"{stage.model}-{name}", stage.model, steps // 2, stage.name, ratio)
            for stage in first
            for name, ratio in ((f"replay-{percent}", REPLAY_RATIO), ("no-replay", 0.0))
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.scale.batch_size * self.scale.max_length

    @property
    def characters_per_domain(self) -> int:
        """Text to collect, so that pre-training sees none of it twice."""
        held_in = CHARACTERS_PER_TOKEN * self.scale.steps * self.tokens_per_step
        return min(max(round(held_in / (1 - HELD_OUT_FRACTION)), LEAST_CHARACTERS), MOST_CHARACTERS)

    def settings(self) -> dict[str, Any]:
        """The plan as JSON can hold it, to recognise an unfinished quickstart as the same."""
        return dataclasses.asdict(self)


def make_plan(preset: str, steps: int | None, seed: int, device: str, data_dir: str | None) -> Plan:
    """The plan for a preset; steps: of pre-training, None for the table's.

    Raises ValueError for a preset that is no mixture of experts, or too few steps.
    """
    preset = preset.replace("-2b-tiny", "-tiny")  # the long names that CptMoeConfig.from_preset takes too
    if preset not in MOE_PRESETS:
        raise ValueError(f"--preset {preset!r} is no mixture of experts: choose one of {', '.join(MOE_PRESETS)}.")
    if steps is not None and steps < LEAST_STEPS:
        raise ValueError(f"--steps {steps} leaves nothing to continue from: give at least {LEAST_STEPS}.")
    size = preset.rpartition("-")[2]
    scale = SCALES[size] if steps is None else dataclasses.replace(SCALES[size], steps=steps)
    return Plan(preset, DENSE_TWINS[size], scale, seed, device, data_dir)


class QuickstartFolder(ResumableFolder):
    """quickstart.json (the plan), corpus/, tokenizer/, work/<stage>/ (the trainer's, until all is done), models/<stage>/
    (to be loaded), records/<stage>.json (a finished stage), results.json, report.html, routing/ (traces and their page).
    """

    def __init__(self, root: str | Path, plan: Plan) -> None:
        super().__init__(root, "quickstart.json", plan.settings())
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.tokenizer = self.root / "tokenizer"
        self.routing = self.root / "routing"

    def work(self, stage: str) -> Path:
        """The trainer's folder of a stage."""
        return self.root / "work" / stage

    def model(self, stage: str) -> Path:
        """The folder that `from_pretrained` loads."""
        return self.root / "models" / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left, or None if it is not finished."""
        return self.read(f"records/{stage}.json")

    def finish(self, stage: str, record: dict[str, Any], keep_work: bool) -> None:
        """Mark a stage as finished, its model being saved; keep_work: another stage starts from its checkpoint."""
        self.write(f"records/{stage}.json", record)
        if not keep_work:
            shutil.rmtree(self.work(stage))

    def conclude(self, results: dict[str, Any]) -> None:
        """Write the results of all stages; what only the trainer needed goes."""
        self.write(self.results.name, results)
        shutil.rmtree(self.root / "work", ignore_errors=True)

    def require_space(self, needed_bytes: int) -> None:
        """Raise ValueError if the disk under the folder cannot hold that much."""
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ValueError(
                f"--output_dir {str(self.root)!r} has {free / 1e9:.1f} GB free and the checkpoints need about "
                f"{needed_bytes / 1e9:.1f} GB: free space, or name a folder on another disk."
            )

    def checkpoint_to_resume(self, stage: str) -> Path | None:
        """The last whole checkpoint of a stage that was killed; what a kill left without one is removed."""
        checkpoint = last_whole_checkpoint(self.work(stage))
        if checkpoint is None:
            shutil.rmtree(self.work(stage), ignore_errors=True)
        return checkpoint


TOKENS_PER_HELD_OUT_DOCUMENT = 1024  # from its beginning; many short views of a domain measure it better than few long


@dataclass(frozen=True)
class DomainTokens:
    """One domain, tokenised: column input_ids, a document per row."""

    name: str
    train: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class QuickstartData:
    """The two domains with their tokenizer; `facts` goes into the results."""

    tokenizer: PreTrainedTokenizerBase
    old: DomainTokens
    new: DomainTokens
    facts: dict[str, Any]


def prepare_data(plan: Plan, folder: QuickstartFolder) -> QuickstartData:
    """Read or collect the text, train the tokenizer on both domains, tokenise."""
    corpus = _corpus(plan, folder)
    tokenizer = _tokenizer(corpus, plan, folder)
    domains = [_tokenised(name, sides, tokenizer, plan.scale.held_out_tokens) for name, sides in corpus.items()]
    facts = {domain.name: _facts(domain, corpus[domain.name]) for domain in domains}
    return QuickstartData(tokenizer, *domains, facts)


def _corpus(plan: Plan, folder: QuickstartFolder) -> Corpus:
    """From the folder if a run before this one left it there, so that resuming reads the same text."""
    kept = load_corpus(folder.root, "corpus")
    if kept is not None:
        return kept
    if plan.data_dir is not None:
        corpus = load_folder_corpus(plan.data_dir, held_out_fraction=HELD_OUT_FRACTION, seed=plan.seed)
    else:
        corpus = build_python_corpus(
            max_characters_per_domain=plan.characters_per_domain, held_out_fraction=HELD_OUT_FRACTION, seed=plan.seed
        )
    save_corpus(corpus, folder.root, "corpus")
    return load_corpus(folder.root, "corpus")


def _tokenizer(corpus: Corpus, plan: Plan, folder: QuickstartFolder) -> PreTrainedTokenizerBase:
    if not folder.tokenizer.is_dir():
        texts = chain.from_iterable(sides["train"]["text"] for sides in corpus.values())
        trained = train_byte_level_bpe(
            texts, plan.scale.vocab_size, model_max_length=plan.scale.max_length, progress=False
        )
        unfinished = folder.root / ".tokenizer"
        shutil.rmtree(unfinished, ignore_errors=True)
        trained.save_pretrained(unfinished)
        unfinished.rename(folder.tokenizer)
    return AutoTokenizer.from_pretrained(folder.tokenizer, local_files_only=True)


def _tokenised(
    name: str, sides: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, held_out_tokens: int
) -> DomainTokens:
    held_out = tokenize_documents(sides["held_out"], tokenizer)
    return DomainTokens(name, tokenize_documents(sides["train"], tokenizer), sample_of(held_out, held_out_tokens))


def sample_of(documents: Dataset, num_tokens: int) -> Dataset:
    """The beginnings of the first documents, about `num_tokens` tokens together, or of all if there are fewer."""
    rows, size = [], 0
    for row in documents:
        rows.append(row["input_ids"][:TOKENS_PER_HELD_OUT_DOCUMENT])
        size += len(rows[-1])
        if size >= num_tokens:
            break
    return Dataset.from_dict({"input_ids": rows}, features=documents.features)


def _facts(domain: DomainTokens, sides: dict[str, Dataset]) -> dict[str, int]:
    return {
        "train_documents": len(sides["train"]),
        "train_characters": sum(map(len, sides["train"]["text"])),
        "train_tokens": sum(map(len, domain.train["input_ids"])),
        "held_out_tokens": sum(map(len, domain.held_out["input_ids"])),
    }


BYTES_PER_WEIGHT = 4  # float32


class BarCallback(TrainerCallback):
    """Moves the bar of the whole job; steps made before a resume count at once."""

    def __init__(self, bar: tqdm, stage: Stage) -> None:
        self.bar, self.stage = bar, stage

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name the stage."""
        self.bar.set_description(self.stage.name)
        self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further."""
        self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest training loss."""
        if logs and "lm_loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['lm_loss']:.2f}", refresh=False)


def run_stage(stage: Stage, plan: Plan, data: QuickstartData, folder: QuickstartFolder, bar: tqdm) -> dict[str, Any]:
    """Train, save to `models/`, and return the record: the trainer's log, sizes and where the model came from."""
    checkpoint = folder.checkpoint_to_resume(stage.name)
    start = None if stage.starts_from is None else last_checkpoint(folder, stage.starts_from, plan)
    trainer = CPTTrainer(
        _model(stage, plan, data.tokenizer, start),
        _arguments(stage, plan, folder),
        **_data_sets(stage, data),
        processing_class=data.tokenizer,
        callbacks=[BarCallback(bar, stage)],
    )
    trainer.remove_callback(ShortPrinter)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder.model(stage.name)))
    model = trainer.model
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(only_active=True),
        "tokens_per_step": plan.tokens_per_step,
        "ideal_mri": model.config.num_experts_per_tok / model.config.num_experts if model.config.is_moe else None,
        "history": trainer.state.log_history,
    }


def last_checkpoint(folder: QuickstartFolder, stage: str, plan: Plan) -> Path:
    """The checkpoint at the end of a pre-training stage, with its Adam moments."""
    return folder.work(stage) / f"checkpoint-{plan.scale.steps}"


def checkpoint_bytes(plan: Plan, vocab_size: int) -> int:
    """Disk that a whole quickstart takes at its height.

    Of each model: three sets of weights, and three checkpoints with Adam moments (of pre-training, the last one of a
    continued run, and the one that takes its place).
    """
    parameters = 0
    for preset in (plan.preset, plan.dense_preset):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CptMoeConfig.from_preset(preset, vocab_size=vocab_size))
        parameters += model.num_parameters()
    return 3 * (BYTES_PER_WEIGHT + BYTES_PER_WEIGHT + BYTES_PER_MOMENT_PAIR) * parameters


def _model(stage: Stage, plan: Plan, tokenizer: PreTrainedTokenizerBase, start: Path | None) -> PreTrainedModel:
    if start is not None:
        return AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
    config = CptMoeConfig.from_preset(
        plan.preset if stage.model == MOE else plan.dense_preset,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(plan.seed)
    return AutoModelForCausalLM.from_config(config)


def _data_sets(stage: Stage, data: QuickstartData) -> dict[str, Any]:
    """Pre-training learns the old domain as its "new" text; both domains are measured when a model is continued."""
    if stage.is_pretraining:
        return {"train_dataset": data.old.train, "eval_dataset": data.old.held_out}
    return {
        "train_dataset": data.new.train,
        "replay_dataset": data.old.train if stage.replay_ratio > 0 else None,
        "eval_dataset": data.new.held_out,
        "replay_eval_dataset": data.old.held_out,
    }


def _arguments(stage: Stage, plan: Plan, folder: QuickstartFolder) -> CPTConfig:
    scale = plan.scale
    args = CPTConfig(
        output_dir=str(folder.work(stage.name)),
        max_steps=stage.steps,
        per_device_train_batch_size=scale.batch_size,
        per_device_eval_batch_size=2 * scale.batch_size,
        max_length=scale.max_length,
        packing="concat",
        replay_ratio=stage.replay_ratio,
        learning_rate=scale.learning_rate,
        keep_optimizer_state=not stage.is_pretraining,
        eval_on_start=not stage.is_pretraining,
        eval_strategy="steps",
        eval_steps=max(1, -(-stage.steps // EVALUATIONS)),
        save_steps=max(1, -(-stage.steps // 2)),
        save_total_limit=1,
        logging_steps=1,
        seed=plan.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=plan.device == "cpu",
        bf16=plan.device == "cuda",
        dataloader_pin_memory=plan.device == "cuda",
        **(PRETRAINING_PHASES if stage.is_pretraining else {}),
    )
    if args.n_gpu > 1:  # one device, so that the batch of the plan is the batch of a step
        args._n_gpu = 1
    return args


# With a few tokens a step, single values of MRI scatter by a tenth: recovery is read from a longer mean.
RECOVERY_TOLERANCE, RECOVERY_MEAN_STEPS = 0.1, 20
RECOVERY = (
    f"steps after the shift until the mean MRI of {RECOVERY_MEAN_STEPS} steps stays within {RECOVERY_TOLERANCE:.0%} "
    "of its level before"
)


def summarise(plan: Plan, records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything the table and the report are made of, as JSON can hold it.

    records: what each stage left, by its name. facts: of the two domains, the old one first.
    """
    old, new = facts
    return {
        "settings": plan.settings(),
        "environment": environment(plan.device),
        "domains": {"old": old, "new": new},
        "corpus": facts,
        "rows": [row_of(stage, plan, records, old, new) for stage in plan.stages],
        "curves": {stage.name: curves_of(stage, records[stage.name]) for stage in plan.stages},
        "ideal_mri": records[plan.stages[0].name]["ideal_mri"],
    }


def environment(device: str) -> dict[str, Any]:
    """Versions and the device that the numbers belong to."""
    return {
        "hf_moe_cpt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
    }


def row_of(stage: Stage, plan: Plan, records: dict[str, dict[str, Any]], old: str, new: str) -> dict[str, Any]:
    """One run in numbers; None where a number does not apply."""
    record = records[stage.name]
    seconds = training_seconds(record)
    row: dict[str, Any] = {
        "run": stage.name,
        "model": plan.preset if stage.model == MOE else plan.dense_preset,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "steps": stage.steps,
        "tokens": stage.steps * record["tokens_per_step"],
        "replay_ratio": None if stage.is_pretraining else stage.replay_ratio,
    }
    if stage.is_pretraining:
        row |= {f"{old} after": _points(record, "eval_new_loss")[-1][1]}
    else:
        row |= _outcome(record, old, new) | _imbalance(record, records[stage.starts_from])
    return row | {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}


def _outcome(record: dict[str, Any], old: str, new: str) -> dict[str, float]:
    old_losses, new_losses = (_points(record, f"eval_{source}_loss") for source in ("replay", "new"))
    outcome = ContinualOutcome(old_losses[0][1], old_losses[-1][1], new_losses[0][1], new_losses[-1][1])
    return {
        f"{old} before": outcome.old_before,
        f"{old} after": outcome.old_after,
        "forgetting": outcome.forgetting,
        f"{new} before": outcome.new_before,
        f"{new} after": outcome.new_after,
        "adaptation": outcome.adaptation,
    }


def _imbalance(record: dict[str, Any], started_from: dict[str, Any]) -> dict[str, float | int | None]:
    if record["ideal_mri"] is None:
        return {}
    before, after = ([value for _, value in _points(part, "mri")] for part in (started_from, record))
    shift = imbalance_around_shift(before, after)
    smoothed = imbalance_around_shift(before, after, RECOVERY_TOLERANCE, RECOVERY_MEAN_STEPS)
    return {
        "MRI before": shift.before,
        "MRI peak": shift.peak,
        "MRI after": shift.after,
        "recovery step": smoothed.recovery_step,
    }


def training_seconds(record: dict[str, Any]) -> float:
    """Seconds of training steps, from the rate logged at each; evaluation and saving are left out."""
    return math.fsum(record["tokens_per_step"] / rate for _, rate in _points(record, "tokens_per_second"))


def curves_of(stage: Stage, record: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name; sources are called old and new, steps count from the start of the run."""
    learned = "old" if stage.is_pretraining else "new"
    keys = {
        "lm_loss/new": f"loss/{learned}",
        "lm_loss/replay": "loss/old",
        "eval_new_loss": f"held_out/{learned}",
        "eval_replay_loss": "held_out/old",
        "learning_rate": "learning_rate",
        "mri": "mri",
    }
    return {name: points for key, name in keys.items() if (points := _points(record, key))}


def _points(record: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in record["history"] if key in entry]


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as people read them: the columns that matter, losses and shares to three decimals, rates whole."""
    shown = []
    for row in results["rows"]:
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        row["seconds"] = round(row["seconds"])
        row["tokens/s"] = round(row.pop("tokens_per_second"))
        shown.append(row)
    old, new = results["domains"].values()
    columns = ["run", f"{old} before", f"{old} after", "forgetting", f"{new} before", f"{new} after", "adaptation"]
    columns += ["MRI before", "MRI peak", "MRI after", "recovery step", "seconds", "tokens/s"]
    return [{column: row.get(column) for column in columns} for row in shown]


ROUTING = ("MRI before", "MRI peak", "MRI after", "recovery step")
SPEED = ("seconds", "tokens/s")
INTRODUCTION = """\
A mixture of experts and a dense model with the same active parameters learn {old} from scratch. Each is then \
continued on {new} twice: with {percent} % of every batch replayed from {old}, and with none. The learning rate runs \
into its constant phase and goes on from there, without a new warm-up.

Losses are held-out, in nats per token. Forgetting is the rise of the loss on {old}, adaptation its fall on {new}. \
MRI is the share of tokens that visit the busiest expert, averaged over layers; {ideal:.3f} is balance. Recovery \
step: {recovery}."""

LAYERS = """\
On held-out text, against the model that had read {old} only. Router saturation is the share of a token's experts \
that it had then; vocabulary specialisation the share of the visits of a token id to the expert it visited most \
then. Dashed: without replay. More, expert by expert, is in routing/report.html."""


def write_quickstart_report(results: dict[str, Any], path: str | Path) -> Path:
    """Write the page and return its path."""
    old, new = results["domains"].values()
    table = table_rows(results)
    losses = _columns(table, *(name for name in table[0] if name not in ROUTING + SPEED))
    sections = [
        Section("What was forgotten, what was learned?", _introduction(results), losses),
        Section(
            "Loss on held-out text",
            "Dashed: without replay.",
            charts=[_held_out(results, name) for name in ("old", "new")],
        ),
        Section(
            "Loss while training, by source", "", charts=[_training_loss(results, name) for name in ("old", "new")]
        ),
        Section("Learning rate", "", charts=[_learning_rate(results)]),
        Section("Routing", "", _columns(table, "run", *ROUTING), charts=[_imbalance_chart(results)]),
        *_routing_by_layer(results),
        Section("What a model writes", _samples(results)),
        Section("What ran", "", _sizes(results)),
        Section("How fast", "", _columns(table, "run", *SPEED)),
        Section("Text", "", [{"domain": name} | facts for name, facts in results["corpus"].items()]),
        Section("Where", "", [{"what": name, "value": value} for name, value in _settings(results).items()]),
    ]
    return write_report(path, f"hf-moe-cpt quickstart: from {old} to {new}", sections)


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows that have any of the columns after the first, with these columns only."""
    return [{name: row[name] for name in names} for row in rows if any(row[name] is not None for name in names[1:])]


def _introduction(results: dict[str, Any]) -> str:
    ratio = max(row["replay_ratio"] or 0.0 for row in results["rows"])
    return INTRODUCTION.format(
        **results["domains"], percent=round(100 * ratio), ideal=results["ideal_mri"], recovery=RECOVERY
    )


def _shift(results: dict[str, Any]) -> int:
    return results["settings"]["scale"]["steps"]


def _curve(results: dict[str, Any], run: str, name: str) -> Series | None:
    """A run's curve on the axis of the whole experiment, where continued runs begin at the shift."""
    points = results["curves"][run].get(name)
    if not points:
        return None
    begin = 0 if run.endswith("pretrained") else _shift(results)
    is_dense = run.startswith("dense")
    return Series(
        run, [begin + step for step, _ in points], [value for _, value in points], 1 if is_dense else 0, "no-" in run
    )


def _chart(
    results: dict[str, Any], name: str, title: str, y_label: str, runs: Sequence[str] | None = None, **options: Any
) -> str:
    """One curve a run, of all runs that have it or of those named; the shift is marked. options: of `line_chart`."""
    curves = [_curve(results, run, name) for run in runs or results["curves"]]
    shift = Mark(_shift(results), f"{results['domains']['new']} begins")
    return line_chart(
        [curve for curve in curves if curve is not None],
        title=title,
        x_label="optimizer step",
        y_label=y_label,
        vertical=[shift],
        **options,
    )


def _held_out(results: dict[str, Any], which: str) -> str:
    domain = results["domains"][which]
    return _chart(results, f"held_out/{which}", f"How well do they predict {domain}?", "held-out loss (nats/token)")


def _training_loss(results: dict[str, Any], which: str) -> str:
    domain = results["domains"][which]
    return _chart(results, f"loss/{which}", f"Loss on {domain} in the training batches", "loss (nats/token)")


def _learning_rate(results: dict[str, Any]) -> str:
    """One pre-training and one continued run: the rate is the same for all."""
    runs = [row["run"] for row in results["rows"] if row["model"] == results["settings"]["preset"]][:2]
    return _chart(results, "learning_rate", "How does the rate go on?", "learning rate", runs=runs, from_zero=True)


def _imbalance_chart(results: dict[str, Any]) -> str:
    ideal = Mark(results["ideal_mri"], "perfect balance")
    return _chart(results, "mri", "How busy is the busiest expert?", "MRI, mean over layers", horizontal=[ideal])


def _routing_by_layer(results: dict[str, Any]) -> list[Section]:
    """Saturation and vocabulary specialisation of the mixtures; nothing for results of before they were compared."""
    routing = results.get("routing")
    if routing is None:
        return []
    old, ideal = results["domains"]["old"], results["ideal_mri"]
    saturation = {
        f"{run}, {text}": routing["saturation"][run][text]
        for run in routing["saturation"]
        for text in results["domains"].values()
    }
    vocabulary = {run: values["input"] for run, values in routing["vocabulary_specialization"].items()}
    charts = [
        _by_layer(
            saturation, f"Do tokens visit the experts that they visited after {old}?", "router saturation", ideal
        ),
        _by_layer(vocabulary, "Do token ids keep to their experts?", "vocabulary specialisation", ideal),
    ]
    return [Section("Routing, layer by layer", LAYERS.format(old=old), charts=charts)]


def _by_layer(curves: dict[str, Any], title: str, y_label: str, ideal: float) -> str:
    series = [Series(name, range(len(values)), values, dashed="no-" in name) for name, values in curves.items()]
    marks = [Mark(1.0, "unchanged"), Mark(ideal, "chance")]
    return line_chart(series, title=title, x_label="MoE layer", y_label=y_label, horizontal=marks)


def _samples(results: dict[str, Any]) -> str:
    """A paragraph for each sample, line breaks as signs."""
    lines = (f"{item['model']}, given: {item['prompt']} ▸ {item['continuation']}" for item in results["samples"])
    return "\n\n".join(line.replace("\n", " ⏎ ") for line in lines)


def _sizes(results: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("run", "model", "parameters", "active_parameters", "steps", "tokens", "replay_ratio")
    return [{name.replace("_", " "): row[name] for name in names} for row in results["rows"]]


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    settings = dict(results["settings"])
    return results["environment"] | settings.pop("scale") | settings


TRACED_TOKENS = 8192  # of each domain's held-out text, a few seconds for each model on two CPU cores


def compare_routing(
    plan: Plan, data: QuickstartData, folder: QuickstartFolder, records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trace the mixtures on both held-out domains, write the page, and return what results.json keeps of it.

    records: of finished stages, whose logs give MRI by training step.
    """
    texts = {data.old.name: data.old.held_out, data.new.name: data.new.held_out}
    traces = {}
    for stage in plan.stages:
        if stage.model != MOE:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder.model(stage.name), local_files_only=True).to(plan.device)
        traces[stage.name] = collect_routing(
            model,
            texts,
            folder.routing / "traces" / stage.name,
            name=stage.name,
            tokenizer=data.tokenizer,
            batch_size=2 * plan.scale.batch_size,
            max_length=plan.scale.max_length,
            tokens_per_domain=TRACED_TOKENS,
            progress=False,
        )
    analysis = analyse_traces(traces, tokenizer=data.tokenizer, training=_curves(plan, records), min_occurrences=5)
    write_routing_report(analysis, folder.routing, f"Routing before and after {data.new.name}")
    return {
        "metrics": {
            name: {text: m["mri"] for text, m in found.items()} for name, found in analysis["metrics"].items()
        },
        "saturation": analysis["saturation"],
        "vocabulary_specialization": analysis["vocabulary_specialization"],
    }


def _curves(plan: Plan, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """MRI by step of each continued mixture, behind that of pre-training."""
    curves = []
    for stage in plan.stages:
        if stage.model != MOE or stage.is_pretraining:
            continue
        steps: list[int] = []
        layers: list[list[float]] = []
        for name in (stage.starts_from, stage.name):
            entries = [entry for entry in records[name]["history"] if "mri/layer_00" in entry]
            begin = 0 if name == stage.starts_from else plan.scale.steps
            steps += [begin + entry["step"] for entry in entries]
            keys = sorted(key for key in entries[0] if key.startswith("mri/layer_"))
            layers = layers or [[] for _ in keys]
            for layer, key in zip(layers, keys, strict=True):
                layer += [entry[key] for entry in entries]
        shift, ideal = plan.scale.steps + 1, records[stage.name]["ideal_mri"]
        curve = imbalance_curve(stage.name, steps, layers, ideal=ideal, shift_step=shift, tolerance=RECOVERY_TOLERANCE)
        curves.append(curve)
    return curves
