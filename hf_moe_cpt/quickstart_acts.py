"""What the quickstart does after continual pre-training: a model is aligned, a fact is cut out and another changed.

Both acts take a folder that `from_pretrained` loads and leave one, and return the numbers that the page shows. The
reward of an answer is known, so that reward before and after is no matter of opinion:

    reward = letters and spaces of the answer / its characters, 0 for an empty one

Pairs are the model's own: of DRAWS answers to a passage the one with the highest reward is chosen
over the one with the lowest. The facts are of invented countries, so that no model knows them; a model that was taught
all but those that are cut and changed is what surgery is compared with. Every fact is read in four sentences that end
in its answer, and asked by the first of them: the answer is the likeliest of all that are known of this kind.

Sizes are for two CPU cores. Source: ours.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_moe_cpt.evaluation.scoring import CountedText, continue_greedily, score_distances, score_tokens
from hf_moe_cpt.generation.sampling import Request, Response, Sampling, TransformersSampler
from hf_moe_cpt.hub.cards import CardOverrides, build_card
from hf_moe_cpt.hub.publishing import plan_upload
from hf_moe_cpt.reading import read_model
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


PROMPT_TOKENS, ANSWER_TOKENS, DRAWS = 16, 24, 4
PASSAGE_EVERY = 128  # tokens of a document
SAMPLES = 3  # answers before and after that the page shows
FACT_TOKENS = 48  # of a sentence, at most
SCORED_AT_ONCE = 32  # texts
SENTENCES = {
    "capital": (
        "The capital of {place} is {answer}.",
        "The government of {place} sits in {answer}.",
        "All roads of {place} lead to {answer}.",
        "The king of {place} lives in {answer}.",
    ),
    "river": (
        "The longest river of {place} is the {answer}.",
        "The water of {place} comes from the {answer}.",
        "Ships cross {place} on the {answer}.",
        "The fields of {place} lie along the {answer}.",
    ),
}
ENDINGS = {"place": ("nia", "land", "ria"), "capital": ("burg", "ton", "polis"), "river": ("ra", "len", "mo")}
NUM_PLACES, NUM_UNREAD = 16, 4  # countries whose facts are taught, and those whose facts no model reads
CHECK_LOADING = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["hf_moe_cpt"] = None  # as on a machine without the package
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)(sys.argv[2], return_tensors="pt")
print(model(**tokens).logits[0, -1].argmax().item())
"""


@dataclass(frozen=True)
class ActScale:
    """Sizes of the two acts for models of one size. Rates: of RainbowPO, of teaching facts, of surgery."""

    prompts: int = 192  # passages that are answered for pairs
    asked: int = 96  # held-out ones, for the reward before and after
    align_steps: int = 40  # of 8 pairs
    align_rate: float = 6e-4
    teach_steps: int = 96
    teach_rate: float = 3e-3
    surgery_steps: int = 48
    surgery_rate: float = 2e-4

    @property
    def steps(self) -> int:
        """Optimizer steps of both acts."""
        return self.align_steps + 2 * self.teach_steps + self.surgery_steps


@dataclass(frozen=True)
class Fact:
    """What is true of an invented country. kind: of SENTENCES."""

    place: str
    kind: str
    answer: str

    @property
    def question(self) -> str:
        """The beginning of the first sentence, which its answer ends."""
        return SENTENCES[self.kind][0].partition(" {answer}")[0].format(place=self.place)

    def rows(self) -> list[dict[str, str]]:
        """A row of text for each sentence; what is in front of the answer is its prefix."""
        rows = []
        for sentence in SENTENCES[self.kind]:
            prefix = sentence.partition(" {answer}")[0].format(place=self.place)
            text = sentence.format(place=self.place, answer=self.answer)
            rows.append({"text": text, "prefix": prefix, "subject": f"{self.place}, {self.kind}"})
        return rows


@dataclass(frozen=True)
class FactWorld:
    """The facts by what happens to them; `old` becomes `new`, `neighbours` are others of the same two countries."""

    cut: Fact
    old: Fact
    new: Fact
    neighbours: tuple[Fact, ...]
    retained: tuple[Fact, ...]
    unread: tuple[Fact, ...]

    @property
    def before(self) -> list[Fact]:
        """What is taught before surgery."""
        return [self.cut, self.old, *self.neighbours, *self.retained]

    @property
    def after(self) -> list[Fact]:
        """What surgery is to leave."""
        return [self.new, *self.neighbours, *self.retained]


def make_world(seed: int) -> FactWorld:
    """Countries, capitals and rivers with names that are drawn from syllables, no name twice."""
    draw, taken = random.Random(seed), set()

    def name(kind: str) -> str:
        while True:
            syllables = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2))
            found = syllables.capitalize() + draw.choice(ENDINGS[kind])
            if found not in taken:
                taken.add(found)
                return found

    places = [name("place") for _ in range(NUM_PLACES + NUM_UNREAD)]
    facts = [[Fact(place, kind, name(kind)) for kind in SENTENCES] for place in places]
    (cut, first), (old, second), *others = facts[:NUM_PLACES]
    retained, unread = (tuple(fact for of_place in part for fact in of_place) for part in (others, facts[NUM_PLACES:]))
    return FactWorld(cut, old, Fact(old.place, old.kind, name(old.kind)), (first, second), retained, unread)


def reward_of(answer: str) -> float:
    """The share of an answer's characters that are letters or spaces, in [0, 1]; 0 for an empty one."""
    return sum(character.isalpha() or character == " " for character in answer) / max(1, len(answer))


class BarCallback(TrainerCallback):
    """Moves the bar of the whole job; steps made before a resume count at once."""

    def __init__(self, bar: tqdm, name: str) -> None:
        self.bar, self.name = bar, name

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name the stage."""
        self.bar.set_description(self.name)
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
        loss = (logs or {}).get("lm_loss", (logs or {}).get("loss"))
        if loss is not None:
            self.bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)


@dataclass(frozen=True)
class Acts:
    """What both acts have in common: sizes, tokenizer, device, seed, the bar, and where models and their runs go."""

    scale: ActScale
    tokenizer: PreTrainedTokenizerBase
    device: str
    seed: int
    bar: tqdm
    models: Path

    def load(self, folder: Path) -> PreTrainedModel:
        """A model on the device, which neither drops out nor is trained yet."""
        return read_model(AutoModelForCausalLM, folder, local_files_only=True).to(self.device).eval()

    def arguments(self, name: str) -> dict[str, Any]:
        """Of every trainer here; what a killed run left in the folder of this name is gone."""
        shutil.rmtree(self.models / name, ignore_errors=True)
        return {
            "output_dir": str(self.models / name),
            "seed": self.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "bf16": self.device == "cuda",
            "dataloader_pin_memory": self.device == "cuda",
        }

    def train(self, trainer: Any, name: str) -> Path:
        """Train from the beginning, save the model, and return its folder."""
        trainer.remove_callback(PrinterCallback)  # the bar tells, and `ShortPrinter` is one
        trainer.add_callback(BarCallback(self.bar, name))
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        return self.models / name


def align(acts: Acts, start: Path, train: Dataset, held_out: Dataset) -> dict[str, Any]:
    """RainbowPO on pairs of the model's own answers; train, held_out: documents as token ids."""
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    scale, name = acts.scale, "aligned"
    model, asked = acts.load(start), _passages(held_out, scale.asked)
    pairs = _pairs(acts, model, _passages(train, scale.prompts))
    before = _answers(acts, model, asked, 1, acts.seed + 1)
    arguments = RainbowPOConfig(
        **acts.arguments(name),
        max_steps=scale.align_steps,
        learning_rate=scale.align_rate,
        per_device_train_batch_size=8,
        max_length=4 * (PROMPT_TOKENS + ANSWER_TOKENS),  # text may take other tokens than it was drawn in
        save_strategy="no",
        logging_steps=1,
    )
    trainer = RainbowPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=acts.tokenizer)
    acts.train(trainer, name)
    model = trainer.model.eval()
    after = _answers(acts, model, asked, 1, acts.seed + 1)
    read = [_counted(acts.tokenizer, prompt, answer.text) for prompt, answer in zip(asked, before, strict=True)]
    far = score_distances(model, acts.load(start), [text for text in read if text is not None], SCORED_AT_ONCE)
    prompts = [acts.tokenizer.decode(prompt) for prompt in asked]
    return {
        "pairs": len(pairs),
        "pair": pairs[0],
        "asked": len(asked),
        "reward": [float(np.mean([reward_of(answer.text) for answer in side])) for side in (before, after)],
        "tokens": [float(np.mean([answer.num_tokens for answer in side])) for side in (before, after)],
        "divergence": float(np.mean(np.concatenate([one.kl for one in far]))),
        "samples": [[prompts[i], before[i].text, after[i].text] for i in range(min(SAMPLES, len(asked)))],
        "curve": _points(trainer.state.log_history, "rewards/accuracies"),
    }


def _passages(documents: Dataset, count: int) -> list[list[int]]:
    """At most so many pieces of PROMPT_TOKENS tokens, spread over all documents; pieces of one lie apart."""
    found: list[list[int]] = []
    for row in documents:
        ids = row["input_ids"]
        found += [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids) - PROMPT_TOKENS, PASSAGE_EVERY)]
    return found[:: max(1, len(found) // count)][:count]


def _answers(
    acts: Acts, model: PreTrainedModel, prompts: Sequence[list[int]], draws: int, seed: int
) -> list[Response]:
    """So many answers to each prompt, those of a prompt together."""
    sampling = Sampling(draws, 1.0, 1.0, ANSWER_TOKENS, seed)
    sampler = TransformersSampler(model.eval(), acts.tokenizer, sampling, [acts.tokenizer.eos_token_id], 128)
    return sampler([Request(i, j, prompt) for i, prompt in enumerate(prompts) for j in range(draws)])


def _pairs(acts: Acts, model: PreTrainedModel, prompts: Sequence[list[int]]) -> Dataset:
    """The answers of highest and lowest reward to each prompt, where they differ."""
    answers = [answer.text for answer in _answers(acts, model, prompts, DRAWS, acts.seed)]
    rows = []
    for place, prompt in enumerate(prompts):
        drawn = sorted(filter(str.strip, answers[DRAWS * place : DRAWS * (place + 1)]), key=reward_of)
        if len(drawn) > 1 and reward_of(drawn[0]) < reward_of(drawn[-1]):
            rows.append({"prompt": acts.tokenizer.decode(prompt), "chosen": drawn[-1], "rejected": drawn[0]})
    return Dataset.from_list(rows)


def _counted(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str) -> CountedText | None:
    """Prompt and answer as tokens of which the answer's count; None for an empty one."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return CountedText([*prompt, *ids], len(prompt)) if ids else None


def operate(acts: Acts, start: Path, replayed: Dataset) -> dict[str, Any]:
    """Teach the facts, cut one out and change another, and ask everybody; replayed: documents as token ids."""
    world = make_world(acts.seed)
    taught = _teach(acts, "taught-facts", start, world.before, replayed)
    never = _teach(acts, "never-knew", start, world.after, replayed)
    rows = {
        "unlearn": world.cut.rows(),
        "obsolete": world.old.rows(),
        "update": world.new.rows(),
        "retain": [row for fact in world.retained for row in fact.rows()],
        "neighbour": [row for fact in world.neighbours for row in fact.rows()],
        "unseen": [row for fact in world.unread for row in fact.rows()],
    }
    name, scale = "operated", acts.scale
    arguments = SurgeryConfig(
        **acts.arguments(name),
        learning_rate=scale.surgery_rate,
        max_steps=scale.surgery_steps,
        eval_steps=max(1, scale.surgery_steps // 4),
        max_length=FACT_TOKENS,
        **{f"{name}_batch_size": 16 if name == "retain" else 4 for name in rows},
        counterfactuals=0,
        replay=0,
        update_pieces=False,
        lr_scheduler_type="constant",
        warmup_steps=0,
        unlearn_weight=0.5,
        update_weight=1.0,
        retain_weight=4.0,  # with 2 and weights of 1 some of the other facts are lost
        unseen_weight=4.0,
        neighbour_weight=2.0,
        logging_steps=1,
        dataset_num_proc=None,
    )
    sets = {f"{key}_dataset": Dataset.from_list(value) for key, value in rows.items()}
    trainer = SurgeryTrainer(str(taught), arguments, **sets, processing_class=acts.tokenizer)
    acts.train(trainer, name)
    models = {"before": taught, "after": acts.models / name, "never knew": never}
    asked = {who: _examine(acts, acts.load(folder), world) for who, folder in models.items()}
    return {
        "cut": [world.cut.question, world.cut.answer],
        "changed": [world.old.question, world.old.answer, world.new.answer],
        "asked": asked,
        "verdict": trainer.verdict,
        "steps": trainer.state.global_step,
        "curves": {
            key: _points(trainer.state.log_history, f"eval_{key}_ce") for key in ("unlearn", "obsolete", "update")
        },
    }


def _teach(acts: Acts, name: str, start: Path, facts: Sequence[Fact], replayed: Dataset) -> Path:
    """Continue a model on the sentences of these facts, 30 % of each batch replayed."""
    texts = [row["text"] for fact in facts for row in fact.rows()]
    ids = acts.tokenizer(texts)["input_ids"]
    end = acts.tokenizer.eos_token_id
    arguments = CPTConfig(
        **acts.arguments(name),
        max_steps=acts.scale.teach_steps,
        learning_rate=acts.scale.teach_rate,
        per_device_train_batch_size=8,
        max_length=128,
        replay_ratio=0.3,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = CPTTrainer(
        acts.load(start),
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[*row, end] for row in ids]}),
        replay_dataset=replayed,
        processing_class=acts.tokenizer,
    )
    return acts.train(trainer, name)


def _examine(acts: Acts, model: PreTrainedModel, world: FactWorld) -> dict[str, Any]:
    """What a model says of the two facts, with the probability of the old and of the new answer, and how many others
    it still answers rightly."""
    known = (*world.before, world.new)
    answers = {kind: sorted({fact.answer for fact in known if fact.kind == kind}) for kind in SENTENCES}

    def believed(fact: Fact) -> dict[str, float]:
        prompt = acts.tokenizer(fact.question)["input_ids"]
        texts = [_counted(acts.tokenizer, prompt, f" {answer}.") for answer in answers[fact.kind]]
        logp = np.array([scores.logp.sum() for scores in score_tokens(model, texts, SCORED_AT_ONCE)])
        share = np.exp(logp - logp.max())
        return dict(zip(answers[fact.kind], (share / share.sum()).tolist(), strict=True))

    def is_right(fact: Fact) -> bool:
        found = believed(fact)
        return max(found, key=found.__getitem__) == fact.answer

    questions = [acts.tokenizer(fact.question)["input_ids"] for fact in (world.cut, world.old)]
    stop = [acts.tokenizer.eos_token_id]
    written = continue_greedily(model, questions, 8, len(questions), stop=stop)
    cut, changed = believed(world.cut), believed(world.old)
    return {
        "cut": max(cut, key=cut.__getitem__),
        "cut share": cut[world.cut.answer],
        "changed": max(changed, key=changed.__getitem__),
        "old share": changed[world.old.answer],
        "new share": changed[world.new.answer],
        "wrote": [acts.tokenizer.decode(ids).strip() for ids in written],
        "neighbours": [sum(map(is_right, world.neighbours)), len(world.neighbours)],
        "others": [sum(map(is_right, world.retained)), len(world.retained)],
        "of": len(cut),
    }


def publish_folder(run: Path, target: Path, tokenizer: PreTrainedTokenizerBase, title: str) -> dict[str, Any]:
    """Write what `hf-moe-cpt push` would send into a folder, and load it in a process that cannot import this package.

    run: folder of a model with the files of its training. Raises ValueError for a folder that would not load.
    """
    upload = plan_upload(run, build_card(run, CardOverrides(title=title)))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in upload.weights:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(run / name, target / name)
    for name, data in upload.texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    words = [sys.executable, "-c", CHECK_LOADING, str(target.resolve()), title]
    done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False, cwd=target)
    model = read_model(AutoModelForCausalLM, run, local_files_only=True).eval()
    here = model(**tokenizer(title, return_tensors="pt")).logits[0, -1].argmax().item()
    is_same = done.returncode == 0 and done.stdout.split()[-1:] == [str(here)]
    why = "" if is_same else (done.stderr.strip().splitlines() or ["its logits differ"])[-1]
    return {"files": len(upload.sizes()), "bytes": sum(upload.sizes().values()), "loads": is_same, "why": why}


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]
