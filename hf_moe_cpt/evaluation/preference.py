"""Judge a policy against a reference: by a reward model, and by how it ranks the answers of preference pairs.

A pair is tokenised as trainers do: the prompt alone, and prompt and answer as a whole; an answer begins where these
begin to differ, and ends with EOS where it is a string. All that can be refused is refused from configurations,
tokenizers and data; weights are read by the first stage that misses a shard.

Source: ours.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.evaluation.resumable import (
    Progress,
    ResumableFolder,
    Row,
    checksum_of_values,
    read_shard,
    write_json,
    write_lines,
)
from hf_moe_cpt.evaluation.scoring import room_of, score_tokens
from hf_moe_cpt.evaluation.statistics import length_controlled_share, pair_outcomes, preference_accuracy, share_of_wins
from hf_moe_cpt.generation.pairs import Columns, PromptRow, load_table, read_messages, read_rows, text_of
from hf_moe_cpt.generation.sampling import (
    LoadOptions,
    Policy,
    PolicyArguments,
    Prompt,
    RewardArguments,
    check_at_least,
    function_of,
    load_policy,
    load_tokenizer,
    require_template,
)
from hf_moe_cpt.machine import DEVICES, check_names, choose_device, machine_facts, release_memory
from hf_moe_cpt.reports import text_table, write_csv
from hf_moe_cpt.trainers.surgery.chunked import check_head


SIDES = ("policy", "reference")
STAGES = tuple(f"{kind}-{side}" for kind in ("responses", "rewards", "divergence", "logps") for side in SIDES)
VERDICT_OF_OUTCOME = {1.0: "win", 0.5: "tie", 0.0: "loss"}

Make = Callable[[Sequence[Any], Progress], list[Row]]  # of items, such as prompts


@dataclass
class SidesArguments(PolicyArguments):
    """Against whom, and with other defaults."""

    ref_model_name_or_path: str | None = HfArg(
        default=None, help="The reference, such as the model that training started from."
    )
    ref_model_revision: str = HfArg(default="main", help="Branch, tag or commit on the Hub.")
    temperature: float = HfArg(default=0.7, help="Of the drawing, above 0; 0.01 is nearly greedy.")
    top_p: float = HfArg(default=0.9, help="Draw from the likeliest tokens of this total probability.")
    batch_size: int = HfArg(default=16, help="Sequences side by side, of responses and of pairs.")


@dataclass
class DataArguments:
    """Prompts and responses for the win rate, pairs for the accuracies; each a .jsonl, .parquet, ..., or a Hub id."""

    prompts: str | None = HfArg(
        default=None, help="Prompts to respond to; if not given, those of --responses, else of --dataset_name."
    )
    prompts_split: str = HfArg(default="train", help="Split of --prompts.")
    prompt_column: str = HfArg(default="prompt", help="Its column of strings or of lists of messages.")
    as_chat: bool = HfArg(default=False, help="Make each string of --prompts the turn of a user.")
    max_prompts: int | None = HfArg(default=None, help="Use only the first so many prompts.")
    responses: str | None = HfArg(default=None, help="The policy's ready responses: rows of prompt and response.")
    ref_responses: str | None = HfArg(default=None, help="The reference's, to the same prompts.")
    dataset_name: str | None = HfArg(default=None, help="Preference pairs: prompt, chosen, rejected, as for DPO.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of pairs on the Hub.")
    dataset_split: str = HfArg(default="test", help="Split of the pairs.")
    max_pairs: int | None = HfArg(default=None, help="Use only the first so many pairs.")
    max_length: int | None = HfArg(
        default=None, help="Tokens of prompt and answer; longer ones are cut. Default: the model's."
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_prompts", "max_pairs")
        check_at_least(self, 2, "max_length")


@dataclass
class OutputArguments:
    """Where it goes, and how it is counted."""

    output_dir: str = HfArg(help="A new folder, or one in which this very run was interrupted.")
    seed: int = HfArg(default=0, help="Of the responses, together with a prompt's row.")
    judge: str | None = HfArg(
        default=None,
        help="A pairwise judge in Python in place of rewards, MODULE:NAME or FILE.py:NAME: judge(prompts, [[a, b]]) "
        "gives the place of each better one, -1 for neither; asked in both orders.",
    )
    tie_margin: float = HfArg(default=0.0, help="Rewards no further apart than this are a tie.")
    confidence: float = HfArg(default=0.95, help="Of the intervals.")
    divergence: bool = HfArg(
        default=False,
        help="Also the policy's divergence from the reference, by its responses; at temperature 1 the KL.",
    )
    shard_size: int = HfArg(default=64, help="Prompts or pairs whose work is stored as one.")
    stop_after: str | None = HfArg(default=None, help=f"Stop there, to go on in a fresh process: {', '.join(STAGES)}.")
    device: str = HfArg(default="auto", help="auto, cpu or cuda.")
    commit: str | None = HfArg(default=None, help="Written into the results in place of git's answer.")

    def __post_init__(self) -> None:
        check_names("--device", [self.device], DEVICES)
        check_names("--stop_after", self.stop_after and [self.stop_after], STAGES)
        check_at_least(self, 1, "shard_size")
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence {self.confidence} must lie in (0, 1), such as 0.95.")
        if not 0 <= self.tie_margin < float("inf"):
            raise ValueError(f"--tie_margin {self.tie_margin} must be at least 0.")


@dataclass
class Job:
    """All arguments of an evaluation."""

    policy: SidesArguments
    data: DataArguments
    reward: RewardArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        if not (self.has_duel or self.has_pairs):
            raise ValueError(
                "nothing to evaluate: give --reward_model_name_or_path for a win rate, --dataset_name for accuracies."
            )
        if self.has_pairs and self.policy.model_name_or_path is None:
            raise ValueError("--dataset_name needs --model_name_or_path: whose log-probabilities are asked for?")
        if self.reward.is_given and self.output.judge is not None:
            raise ValueError(f"--judge {self.output.judge!r} takes the place of rewards: give one of them.")
        if self.output.divergence and None in (self.policy.model_name_or_path, self.policy.ref_model_name_or_path):
            raise ValueError(
                "--divergence compares two models: give --model_name_or_path and --ref_model_name_or_path."
            )
        if self.has_duel:
            self._check_duel()
        else:
            for name in ("prompts", "responses", "ref_responses"):
                if getattr(self.data, name) is not None:
                    raise ValueError(f"--{name} needs --reward_model_name_or_path: who judges the responses?")

    def _check_duel(self) -> None:
        data, policy = self.data, self.policy
        for who, prefix in zip(SIDES, ("", "ref_"), strict=True):
            model, responses = f"{prefix}model_name_or_path", f"{prefix}responses"
            has_model, has_responses = getattr(policy, model) is not None, getattr(data, responses) is not None
            if not (has_model or has_responses):
                raise ValueError(f"the win rate needs a {who}: give --{model}, or --{responses} with ready responses.")
            if has_model and has_responses and not self.has_pairs:
                raise ValueError(f"Give one of --{model} and --{responses}: the first would not be used.")
        if data.prompts is None and data.responses is None and data.ref_responses is None and not self.has_pairs:
            raise ValueError("the win rate needs prompts: give --prompts, or --dataset_name to take those of pairs.")

    @property
    def has_duel(self) -> bool:
        """Whether policy and reference answer prompts and a reward model or a function judges."""
        return self.reward.is_given or self.output.judge is not None

    @property
    def has_pairs(self) -> bool:
        """Whether log-probabilities of preference pairs are taken."""
        return self.data.dataset_name is not None


class Measure(NamedTuple):
    """A value of `count` prompts or pairs; low and high are the ends of its interval."""

    value: float
    low: float | None
    high: float | None
    count: int


def judge(
    responses: dict[str, Sequence[Row]], rewards: dict[str, Sequence[float | None]], tie_margin: float
) -> list[Row]:
    """One row for each prompt that both sides answered: both responses, rewards, margin and verdict.

    Equal responses are a tie whatever rounding does to their rewards. Lengths are characters.
    """
    rows = []
    for policy, reference, reward, ref_reward in zip(
        *(responses[side] for side in SIDES), *(rewards[side] for side in SIDES), strict=True
    ):
        if policy["response"] is None or reference["response"] is None:
            continue
        margin = 0.0 if policy["response"] == reference["response"] else reward - ref_reward
        (outcome,) = pair_outcomes([margin], tie_margin).tolist()
        rows.append(
            {
                "index": policy["index"],
                "prompt": policy["prompt"],
                "response": policy["response"],
                "ref_response": reference["response"],
                "reward": reward,
                "ref_reward": ref_reward,
                "margin": margin,
                "verdict": VERDICT_OF_OUTCOME[outcome],
                "length": len(policy["response"]),
                "ref_length": len(reference["response"]),
                "finished": policy.get("finished"),
                "ref_finished": reference.get("finished"),
            }
        )
    return rows


def win_measures(judged: Sequence[Row], confidence: float) -> dict[str, Measure]:
    """Shares of wins, counts, rewards and lengths of at least one judged row."""
    outcome_of = {verdict: outcome for outcome, verdict in VERDICT_OF_OUTCOME.items()}
    outcomes = [outcome_of[row["verdict"]] for row in judged]
    lengths = [row["length"] - row["ref_length"] for row in judged]
    count = len(judged)
    controlled = length_controlled_share(outcomes, lengths, confidence)
    measures = {
        "win rate": Measure(*share_of_wins(outcomes, confidence), count),
        "length-controlled win rate": Measure(*controlled[:3], count),
        "length effect": Measure(controlled.length_effect, None, None, count),
    }
    for outcome, plural in ((1.0, "wins"), (0.5, "ties"), (0.0, "losses")):
        measures[plural] = Measure(outcomes.count(outcome), None, None, count)
    margins = [row["margin"] for row in judged]
    measures |= {
        "mean reward of policy": _mean([row["reward"] for row in judged], confidence),
        "mean reward of reference": _mean([row["ref_reward"] for row in judged], confidence),
        "mean reward margin": _mean(margins, confidence),
        "median reward margin": Measure(statistics.median(margins), None, None, count),
        "mean characters of policy": _mean([row["length"] for row in judged], confidence),
        "mean characters of reference": _mean([row["ref_length"] for row in judged], confidence),
    }
    for side, name in zip(SIDES, ("finished", "ref_finished"), strict=True):
        known = [row[name] for row in judged if row[name] is not None]
        if known:
            measures[f"share of unfinished responses of {side}"] = Measure(
                known.count(False) / len(known), None, None, len(known)
            )
    return measures


def _mean(values: Sequence[float], confidence: float) -> Measure:
    """Mean with its normal interval; no interval of a single value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Measure(mean, None, None, count)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * statistics.stdev(values) / math.sqrt(count)
    return Measure(mean, mean - reach, mean + reach, count)


def accuracy_measures(
    scored: Sequence[Row], ref_scored: Sequence[Row] | None, confidence: float
) -> dict[str, Measure]:
    """The three accuracies of the policy's log-probabilities; with a reference's also those of the log-ratios."""
    readable = [row for row in scored if row["chosen_logp"] is not None]
    columns = {
        name: [row[name.removesuffix("s")] for row in readable]
        for name in ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    }
    kinds: dict[str, dict[str, list[float]]] = {"of log-probabilities": {}}
    if ref_scored is not None:
        of_reference = [row for row in ref_scored if row["chosen_logp"] is not None]
        names = ("chosen_logps", "rejected_logps")
        kinds["of log-ratios"] = {
            f"ref_{name}": [row[name.removesuffix("s")] for row in of_reference] for name in names
        }
    measures = {}
    for kind, reference in kinds.items():
        found = preference_accuracy(**columns, **reference, confidence=confidence)
        shares = {
            "accuracy": found.plain,
            "length-normalised accuracy": found.length_normalized,
            "length-controlled accuracy": found.length_controlled,
        }
        measures |= {f"{name} {kind}": Measure(*share[:3], found.num_pairs) for name, share in shares.items()}
    lengths = {side: statistics.fmean(columns[f"{side}_lengths"]) for side in ("chosen", "rejected")}
    count = len(readable)
    return measures | {f"mean tokens of {side}": Measure(mean, None, None, count) for side, mean in lengths.items()}


def write_results(
    root: Path,
    measures: dict[str, Measure],
    notes: Sequence[str],
    facts: dict[str, Any],
    lines: dict[str, Sequence[Row]],
) -> None:
    """summary.json, summary.csv and one file of JSON lines for each entry of `lines`. NaN becomes null in JSON."""
    for name, rows in lines.items():
        write_lines(root / f"{name}.jsonl", rows)
    plain = {
        name: {key: _plain(value) for key, value in measure._asdict().items()} for name, measure in measures.items()
    }
    write_json(root / "summary.json", {"measures": plain, "notes": list(notes), **facts})
    write_csv(root / "summary.csv", [{"measure": name, **measure._asdict()} for name, measure in measures.items()])


def _plain(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def table_rows(measures: dict[str, Measure], confidence: float) -> list[dict[str, Any]]:
    """The measures for a terminal."""
    interval = f"{100 * confidence:.4g} % interval"
    return [
        {
            "measure": name,
            "value": _text(measure.value),
            interval: None if measure.low is None else f"{_text(measure.low)} to {_text(measure.high)}",
            "of": measure.count,
        }
        for name, measure in measures.items()
    ]


def _text(value: float) -> str | None:
    if math.isnan(value):
        return None
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


@dataclass(frozen=True)
class PairRow:
    """One preference pair: strings, or a conversation with answers as lists of messages."""

    index: int
    prompt: Prompt
    chosen: Any
    rejected: Any


def read_responses(path: str, option: str, max_rows: int | None) -> tuple[list[PromptRow], list[str]]:
    """Prompts and responses of a file with the columns `prompt` and `response`. Raises ValueError, naming the option.

    A response is a string, or a list with one message.
    """
    table = load_table(path)
    if "response" not in table.column_names:
        raise ValueError(f"{option} {path!r} has no column 'response' but {table.column_names}.")
    rows = read_rows(table, Columns(), max_rows)
    responses = [text_of(value) for value in table["response"][: len(rows)]]
    for index, response in enumerate(responses):
        if response is None:
            raise ValueError(f"{option} {path!r}: the response of row {index} (counted from 0) is no string.")
    return rows, responses


def require_same_prompts(rows: Sequence[PromptRow], others: Sequence[PromptRow], option: str, source: str) -> None:
    """Raise ValueError unless both hold the same prompts in the same order. option, source: what names them."""
    if len(rows) != len(others):
        raise ValueError(f"{option} answers {len(others)} prompts and {source} has {len(rows)}: give one for each.")
    for row, other in zip(rows, others, strict=True):
        if row.prompt != other.prompt:
            raise ValueError(
                f"row {row.index} (counted from 0) of {option} answers another prompt than {source} has there: give "
                "both in the same order."
            )


def read_pairs(name: str, config_name: str | None, split: str, max_pairs: int | None) -> list[PairRow]:
    """Preference pairs with or without the column `prompt`. Raises ValueError for the first row that is no pair.

    Without it, and where it is a text beside messages, the prompt is what both answers begin with, as in TRL.
    """
    table = load_table(name, split, config_name)
    for column in ("chosen", "rejected"):
        if column not in table.column_names:
            raise ValueError(f"--dataset_name {name!r} has no column {column!r} but {table.column_names}.")
    count = len(table) if max_pairs is None else min(max_pairs, len(table))
    if count == 0:
        raise ValueError(f"--dataset_name {name!r} has no rows in split {split!r}.")
    kept = [column for column in ("prompt", "chosen", "rejected") if column in table.column_names]
    selected = table.select(range(count)).select_columns(kept).with_format(None)
    return [_pair(index, row, f"row {index} (counted from 0) of {name!r}") for index, row in enumerate(selected)]


def _pair(index: int, row: dict[str, Any], where: str) -> PairRow:
    prompt, chosen, rejected = (
        value if isinstance(value := row.get(name), str) else read_messages(value)
        for name in ("prompt", "chosen", "rejected")
    )
    if type(chosen) is not type(rejected) or chosen is None:
        raise ValueError(
            f"{where} is no preference pair: give chosen and rejected as strings, or as lists of messages with role "
            "and content."
        )
    if type(prompt) is not type(chosen):
        shared = _num_shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not (prompt and chosen and rejected):
        raise ValueError(f"{where} lacks a prompt or an answer: both answers must begin alike and end apart.")
    return PairRow(index, prompt, chosen, rejected)


def _num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages or characters both begin with, the last of either left out; no prompt ends with a space."""
    most = max(0, min(len(one), len(other)) - 1)
    shared = next((place for place in range(most) if one[place] != other[place]), most)
    return shared - 1 if shared and one[shared - 1] == " " else shared


def prompts_of(pairs: Sequence[PairRow]) -> list[PromptRow]:
    """The different prompts of the pairs, in order."""
    distinct = {json.dumps(pair.prompt): pair.prompt for pair in pairs}
    return [PromptRow(index, prompt) for index, prompt in enumerate(distinct.values())]


class AnswerTokens(NamedTuple):
    """ids: prompt and answer, cut at the limit. start: place of the answer's first token, at least 1 if it is read."""

    ids: list[int]
    start: int
    was_cut: bool


def tokenize_answers(
    prompt: Prompt, answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[AnswerTokens]:
    """Each answer after the prompt; all begin at the same place, the first where any of them leaves the prompt.

    prompt: a string with answers as strings, or messages with answers as lists of messages.
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        texts = [answer if eos and answer.endswith(eos) else answer + eos for answer in answers]
        prompt_ids = tokenizer(prompt)["input_ids"]
        wholes = [tokenizer(prompt + text)["input_ids"] for text in texts]
    else:
        options = {"tokenize": True, "return_dict": True}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        wholes = [tokenizer.apply_chat_template(prompt + answer, **options)["input_ids"] for answer in answers]
    start = len(os.path.commonprefix([prompt_ids, *wholes]))
    limit = max(map(len, wholes)) if max_length is None else max_length
    return [AnswerTokens(whole[:limit], start, len(whole) > limit) for whole in wholes]


def is_readable(answers: Sequence[AnswerTokens]) -> bool:
    """Whether at least one token of every answer is left and has a token before it."""
    return all(1 <= answer.start < len(answer.ids) for answer in answers)


class Stopped(Exception):
    """The stage that --stop_after names is finished."""


@dataclass
class Side:
    """The policy or the reference: a model, ready responses, or both. policy: set where the model draws responses."""

    name: str
    model: str | None
    options: LoadOptions
    responses: list[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    policy: Policy | None = None


class Evaluation:
    """The checked inputs of a job and its stages. Raises ValueError before any weight is read.

    notes: sentences for the reader of the results. The folder holds eval_preference.json (the settings),
    work/<stage>/<number>.jsonl (a line for each row of a shard), then the results.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.notes = job, []
        self.device = choose_device(job.output.device)
        policy = job.policy
        names = (policy.model_name_or_path, policy.ref_model_name_or_path)
        loading = (policy.dtype, policy.attn_implementation, policy.trust_remote_code, self.device.type)
        self.sides = {
            side: Side(side, name, LoadOptions(revision, *loading))
            for side, name, revision in zip(
                SIDES, names, (policy.model_revision, policy.ref_model_revision), strict=True
            )
        }
        for side in self.sides.values():
            if side.model is not None:
                side.tokenizer = load_tokenizer(side.model, side.options)
        self.pairs: list[PairRow] = []
        self.prompts: list[PromptRow] = []
        if job.has_pairs:
            data = job.data
            self.pairs = read_pairs(data.dataset_name, data.dataset_config, data.dataset_split, data.max_pairs)
            for side in self.sides.values():
                if side.model is not None:
                    require_template(side.tokenizer, [pair.prompt for pair in self.pairs], "pairs", side.name)
        if job.has_duel:
            self._read_prompts()
            self._check_duel()
        settings = {**self._settings(), "shard_size": job.output.shard_size}
        self.folder = ResumableFolder(job.output.output_dir, "eval_preference.json", settings)

    def duel(self) -> tuple[dict[str, list[Row]], dict[str, list[float | None]]]:
        """Responses and rewards by side, a row for each prompt; None for prompts that are too long."""
        sides = self.sides.items()
        responses = {name: self._stage("responses", side, self.prompts, self._responder) for name, side in sides}
        if self.job.output.judge is not None:
            both = list(zip(*responses.values(), strict=True))
            shares = [row["share"] for row in self._stage("rewards", self.sides["policy"], both, self._pairwise_judge)]
            rewards = {name: [{"reward": share, "cut": False} for share in shares] for name in SIDES}
            rewards["reference"] = [{"reward": s if s is None else 1.0 - s, "cut": False} for s in shares]
        else:
            rewards = {name: self._stage("rewards", side, responses[name], self._judge) for name, side in sides}
        for name, rows in rewards.items():
            if num_cut := sum(row["cut"] for row in rows):
                self.notes.append(f"{num_cut} responses of the {name} lost their beginning before the reward model.")
        both = zip(*responses.values(), strict=True)
        if num_skipped := sum(any(row["response"] is None for row in rows) for rows in both):
            self.notes.append(f"{num_skipped} of {len(self.prompts)} prompts are too long and left out.")
        return responses, {name: [row["reward"] for row in rows] for name, rows in rewards.items()}

    def log_ratios(self, responses: Sequence[Row]) -> list[float]:
        """Log-probability of each of the policy's responses, minus the reference's, in nats."""
        logps = [self._stage("divergence", side, responses, self._response_scorer) for side in self.sides.values()]
        return [own["logp"] - other["logp"] for own, other in zip(*logps, strict=True) if own["logp"] is not None]

    def pair_scores(self) -> tuple[list[Row], list[Row] | None]:
        """Log-probabilities and tokens of the pairs, of the policy and, if its tokens are the same, the reference."""
        policy, reference = self.sides.values()
        scored = self._stage("logps", policy, self.pairs, self._pair_scorer, unit="pair")
        num_unread = sum(row["chosen_logp"] is None for row in scored)
        if num_unread == len(scored):
            raise ValueError("no pair fits: every prompt fills --max_length; raise it.")
        if num_unread:
            self.notes.append(f"{num_unread} of {len(scored)} pairs are left out: the prompt alone is too long.")
        if num_cut := sum(row["cut"] for row in scored):
            self.notes.append(f"{num_cut} of {len(scored)} pairs have an answer that was cut.")
        if reference.model is None:
            return scored, None
        if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            self.notes.append("No accuracies of log-ratios: policy and reference have different tokenizers.")
            return scored, None
        return scored, self._stage("logps", reference, self.pairs, self._pair_scorer, unit="pair")

    def _stage(
        self, kind: str, side: Side, items: Sequence[Any], load: Callable[[Side], Make], unit: str = "response"
    ) -> list[Row]:
        stage, size = f"{kind}-{side.name}", self.job.output.shard_size
        shards = [items[start : start + size] for start in range(0, len(items), size)]
        sizes = {f"work/{stage}/{number:05d}.jsonl": len(shard) for number, shard in enumerate(shards)}

        def load_shards() -> Callable[[int, Progress], list[Row]]:
            make = load(side)
            return lambda place, progress: make(shards[place], progress)

        self.folder.make_rows(stage, sizes, load_shards, unit)
        release_memory(self.device)
        if self.job.output.stop_after == stage:
            raise Stopped
        return [row for name in sizes for row in read_shard(self.folder.root / name)]

    def _responder(self, side: Side) -> Make:
        """From prompts to responses: ready-made ones, or drawn by the model; those of policy and reference apart."""
        if side.responses is not None:
            return lambda rows, progress: [_response(row, side.responses[row.index]) for row in rows]
        sampler = side.policy.load()

        def respond(rows: Sequence[PromptRow], progress: Progress) -> list[Row]:
            drawn = side.policy.respond(sampler, {row.index: row.prompt for row in rows}, progress)
            return [_response(row, *(drawn[row.index][0] if drawn[row.index] else (None,))) for row in rows]

        return respond

    def _judge(self, side: Side) -> Make:
        """From responses to rewards."""
        scorer = self.reward.load()

        def judge(rows: Sequence[Row], progress: Progress) -> list[Row]:
            answered = [row for row in rows if row["response"] is not None]
            scores = scorer([(row["prompt"], row["response"]) for row in answered], progress)
            score_of = {row["index"]: score for row, score in zip(answered, scores, strict=True)}
            found = [score_of.get(row["index"]) for row in rows]
            return [
                {"index": row["index"], "reward": score and score.reward, "cut": bool(score and score.was_cut)}
                for row, score in zip(rows, found, strict=True)
            ]

        return judge

    def _pairwise_judge(self, side: Side) -> Make:
        """From both responses to the share of the policy: 1, 1/2 or 0, as both orders say."""
        place = self.job.output.judge
        asked = function_of("judge", place)

        def judge(rows: Sequence[tuple[Row, Row]], progress: Progress) -> list[Row]:
            answered = [row for row in rows if None not in (row[0]["response"], row[1]["response"])]
            prompts, shares = (
                [own["prompt"] for own, _ in answered],
                dict.fromkeys((r[0]["index"] for r in rows), None),
            )
            for order in (1, -1):
                better = asked(prompts, [[row["response"] for row in pair[::order]] for pair in answered])
                for (own, _), choice in zip(answered, better, strict=True):
                    if choice not in (-1, 0, 1):
                        raise ValueError(
                            f"--judge {place!r} gives {choice!r}: 0 or 1 for the better one, -1 for neither."
                        )
                    share = 0.5 if choice == -1 else float((choice == 0) == (order == 1))
                    shares[own["index"]] = (shares[own["index"]] or 0.0) + share / 2
            progress(len(rows))
            return [{"index": index, "share": share} for index, share in shares.items()]

        return judge

    def _response_scorer(self, side: Side) -> Make:
        """From the policy's responses to their log-probabilities; None for none and for prompts that are too long."""
        model = load_policy(side.model, side.options)
        check_head(model)
        limit = room_of(model, self.job.data)

        def score(rows: Sequence[Row], progress: Progress) -> list[Row]:
            texts = [
                row["response"]
                if isinstance(row["prompt"], str)
                else [{"role": "assistant", "content": row["response"]}]
                for row in rows
            ]
            tokens = {
                row["index"]: tokenize_answers(row["prompt"], [text], side.tokenizer, limit)
                for row, text in zip(rows, texts, strict=True)
                if row["response"] is not None
            }
            tokens = {index: answers[0] for index, answers in tokens.items() if is_readable(answers)}
            found = score_tokens(model, list(tokens.values()), self.job.policy.batch_size)
            logps = {n: float(s.logp.sum(dtype=np.float64)) for n, s in zip(tokens, found, strict=True)}
            progress(len(rows))
            return [{"index": row["index"], "logp": logps.get(row["index"])} for row in rows]

        return score

    def _pair_scorer(self, side: Side) -> Make:
        """From pairs to log-probabilities; None for pairs whose prompt leaves no room."""
        model = load_policy(side.model, side.options)
        check_head(model)
        limit = room_of(model, self.job.data)

        def score(pairs: Sequence[PairRow], progress: Progress) -> list[Row]:
            tokens = [tokenize_answers(p.prompt, (p.chosen, p.rejected), side.tokenizer, limit) for p in pairs]
            readable = [place for place, answers in enumerate(tokens) if is_readable(answers)]
            flat = [answer for place in readable for answer in tokens[place]]
            scores = iter(score_tokens(model, flat, self.job.policy.batch_size))
            found = {place: (next(scores).logp, next(scores).logp) for place in readable}
            rows = []
            for place, pair in enumerate(pairs):
                row: Row = {"index": pair.index, "cut": place in found and any(a.was_cut for a in tokens[place])}
                for answer, logp in zip(("chosen", "rejected"), found.get(place, (None, None)), strict=True):
                    row[f"{answer}_logp"] = None if logp is None else float(logp.sum(dtype=np.float64))
                    row[f"{answer}_length"] = None if logp is None else len(logp)
                rows.append(row)
                progress(1)
            return rows

        return score

    def _read_prompts(self) -> None:
        """The prompts and where they are from, and the ready responses to them."""
        data, source = self.job.data, None
        if data.prompts is not None:
            columns = Columns(data.prompt_column, as_chat=data.as_chat)
            table = load_table(data.prompts, data.prompts_split)
            self.prompts, source = read_rows(table, columns, data.max_prompts), f"--prompts {data.prompts!r}"
        for side, option in zip(SIDES, ("responses", "ref_responses"), strict=True):
            if (path := getattr(data, option)) is not None:
                rows, responses = read_responses(path, f"--{option}", data.max_prompts)
                if source is None:
                    self.prompts, source = rows, f"--{option} {path!r}"
                require_same_prompts(self.prompts, rows, f"--{option} {path!r}", source)
                self.sides[side].responses = responses
        if source is None:
            self.prompts = prompts_of(self.pairs)[: data.max_prompts]

    def _check_duel(self) -> None:
        policy, output = self.job.policy, self.job.output
        if output.judge is not None:
            function_of("judge", output.judge)
        else:
            self.reward = self.job.reward.scorer(policy.trust_remote_code, self.device.type)
        for side in self.sides.values():
            if side.responses is None:
                seed = derive_seed(output.seed, side.name)
                side.policy = Policy(side.model, side.options, policy, num_samples=1, seed=seed)
                require_template(side.tokenizer, [row.prompt for row in self.prompts], "prompts", side.name)

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the shards, up to rounding: neither batch sizes nor the device."""
        job = self.job
        policy, data, reward = job.policy, job.data, job.reward
        chosen: list[tuple[Any, tuple[str, ...]]] = [
            (policy, ("model_name_or_path", "model_revision", "ref_model_name_or_path", "ref_model_revision", "dtype"))
        ]
        settings: dict[str, Any] = {"seed": job.output.seed}
        if job.has_duel:
            settings["prompts_checksum"] = checksum_of_values([row.prompt for row in self.prompts])
            for side in self.sides.values():
                settings[f"responses_checksum_{side.name}"] = side.responses and checksum_of_values(side.responses)
            settings["reward_text_format"] = "judge" if job.output.judge else self.reward.text_format
            settings |= {"judge": job.output.judge} if job.output.judge else {}
            names = ("model_name_or_path", "model_revision", "dtype", "max_length")
            names += ("function",) if reward.reward_function is not None else ()
            chosen.append((reward, tuple(f"reward_{name}" for name in names)))
            chosen.append((policy, ("temperature", "top_p", "max_new_tokens", "use_vllm")))
            chosen.append((data, ("prompts", "responses", "ref_responses")))
        if job.has_pairs:
            settings["pairs_checksum"] = checksum_of_values([[p.prompt, p.chosen, p.rejected] for p in self.pairs])
            chosen.append((data, ("dataset_name", "dataset_split", "max_length")))
        return settings | {name: getattr(group, name) for group, names in chosen for name in names}


def _response(row: PromptRow, text: str | None, finished: bool | None = None, num_tokens: int | None = None) -> Row:
    """A line of a shard. text: None where the prompt is too long. finished, num_tokens: None where nobody counted."""
    return {"index": row.index, "prompt": row.prompt, "response": text, "finished": finished, "tokens": num_tokens}


def run(job: Job) -> str:
    """Check everything, make what is missing, write the results; the lines to print at the end."""
    work = Evaluation(job)
    work.folder.claim()
    output, root = job.output, work.folder.root
    measures: dict[str, Measure] = {}
    lines: dict[str, Sequence[Row]] = {}
    try:
        if job.has_duel:
            responses, rewards = work.duel()
            judged = judge(responses, rewards, output.tie_margin)
            if not judged:
                raise ValueError("no prompt is short enough for both models: give shorter ones or fewer new tokens.")
            measures |= win_measures(judged, output.confidence)
            if output.divergence:
                ratios = work.log_ratios(responses["policy"])
                measures["divergence from reference (nats)"] = _mean(ratios, output.confidence)
            lines["judged"] = judged
            for side, key in zip(SIDES, ("response", "ref_response"), strict=True):
                lines[f"responses_{side}"] = [{"prompt": row["prompt"], "response": row[key]} for row in judged]
        if job.has_pairs:
            scored, ref_scored = work.pair_scores()
            measures |= accuracy_measures(scored, ref_scored, output.confidence)
            lines["pairs"] = scored
            if ref_scored is not None:
                lines["pairs_reference"] = ref_scored
    except Stopped:
        return f"{root} holds {output.stop_after}; start again without --stop_after to go on."
    facts = {"settings": work.folder.settings, "machine": machine_facts(work.device, output.commit)}
    write_results(root, measures, work.notes, facts, lines)
    return "\n".join([*work.notes, f"files: {root}", "", text_table(table_rows(measures, output.confidence))])
