"""The stages of an evaluation: responses of policy and reference, their rewards, log-probabilities of pairs.

All that can be refused is refused while the object is made, from configurations, tokenizers and data; weights are read
by the first stage that misses a shard. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.arguments import json_object
from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.scripts.benchmark_tools import choose_device, release_memory
from hf_moe_cpt.scripts.eval_preference_folder import EvaluationFolder, MakeRows, Row
from hf_moe_cpt.scripts.eval_preference_inputs import (
    PairRow,
    checksum_of,
    prompts_of,
    read_pairs,
    read_responses,
    require_same_prompts,
)
from hf_moe_cpt.scripts.eval_preference_logps import answer_scores, is_readable, tokenize_answers
from hf_moe_cpt.scripts.eval_preference_results import SIDES
from hf_moe_cpt.scripts.rejection_sample_data import Columns, PromptRow, load_table, read_rows
from hf_moe_cpt.scripts.rejection_sample_generation import (
    Request,
    Sampling,
    TransformersSampler,
    encode_prompt,
    load_vllm,
    require_vllm,
)
from hf_moe_cpt.scripts.rejection_sample_models import (
    LoadOptions,
    check_reward_model,
    load_generation_config,
    load_policy,
    load_reward_model,
    load_tokenizer,
    read_config,
    room_for_prompt,
    stop_tokens,
)
from hf_moe_cpt.scripts.rejection_sample_scoring import RewardScorer, resolve_text_format


if TYPE_CHECKING:
    from hf_moe_cpt.scripts.eval_preference import Job


class Stopped(Exception):
    """The stage that --stop_after names is finished."""


@dataclass
class Side:
    """The policy or the reference: a model, ready responses, or both."""

    name: str
    model: str | None
    options: LoadOptions
    responses: list[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


class Evaluation:
    """The checked inputs of a job and its stages. Raises ValueError before any weight is read.

    notes: sentences for the reader of the results.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.notes = job, []
        self.device = choose_device(job.output.device)
        policy = job.policy
        names = (policy.model_name_or_path, policy.ref_model_name_or_path)
        revisions = (policy.model_revision, policy.ref_model_revision)
        self.sides = {
            side: Side(side, name, self._options(revision, policy.dtype, policy.attn_implementation))
            for side, name, revision in zip(SIDES, names, revisions, strict=True)
        }
        for side in self.sides.values():
            if side.model is not None:
                side.tokenizer = load_tokenizer(side.model, side.options)
        self.pairs: list[PairRow] = []
        self.prompts: list[PromptRow] = []
        if job.has_pairs:
            data = job.data
            self.pairs = read_pairs(data.dataset_name, data.dataset_config, data.dataset_split, data.max_pairs)
            self._check_pairs()
        if job.has_duel:
            self._read_prompts()
            self._check_duel()
        self.folder = EvaluationFolder(job.output.output_dir, self._settings(), job.output.shard_size)

    def duel(self) -> tuple[dict[str, list[Row]], dict[str, list[float | None]]]:
        """Responses and rewards by side, a row for each prompt; None for prompts that are too long."""
        sides = self.sides.items()
        responses = {name: self._stage("responses", side, self.prompts, self._responder) for name, side in sides}
        rewards = {name: self._stage("rewards", side, responses[name], self._judge) for name, side in sides}
        for name, rows in rewards.items():
            if num_cut := sum(row["cut"] for row in rows):
                self.notes.append(f"{num_cut} responses of the {name} lost their beginning before the reward model.")
        both = zip(*responses.values(), strict=True)
        if num_skipped := sum(any(row["response"] is None for row in rows) for rows in both):
            self.notes.append(f"{num_skipped} of {len(self.prompts)} prompts are too long and left out.")
        return responses, {name: [row["reward"] for row in rows] for name, rows in rewards.items()}

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
        self, kind: str, side: Side, items: Sequence[Any], load: Callable[[Side], MakeRows], unit: str = "response"
    ) -> list[Row]:
        stage = f"{kind}-{side.name}"
        rows = self.folder.rows_of(stage, items, lambda: load(side), unit)
        release_memory(self.device)
        if self.job.output.stop_after == stage:
            raise Stopped
        return rows

    def _responder(self, side: Side) -> MakeRows:
        """From prompts to responses: ready-made ones, or drawn by the model; those of policy and reference apart."""
        if side.responses is not None:
            ready = side.responses
            return lambda rows, progress: [_response(row, ready[row.index]) for row in rows]
        policy = self.job.policy
        seed = derive_seed(self.job.output.seed, side.name)
        sampling = Sampling(1, policy.temperature, policy.top_p, policy.max_new_tokens, seed)
        stop = stop_tokens(load_generation_config(side.model, side.options), side.tokenizer)
        room = room_for_prompt(read_config(side.model, side.options), policy.max_new_tokens, None)
        if policy.use_vllm:
            engine = json_object("--vllm_options", policy.vllm_options)
            sampler = load_vllm(side.model, side.options, engine, side.tokenizer, sampling, stop)
        else:
            model = load_policy(side.model, side.options)
            sampler = TransformersSampler(model, side.tokenizer, sampling, stop, policy.batch_size)

        def respond(rows: Sequence[PromptRow], progress: Callable[[int], Any]) -> list[Row]:
            ids = {row.index: encode_prompt(row.prompt, side.tokenizer) for row in rows}
            fitting = {index: tokens for index, tokens in ids.items() if room is None or len(tokens) <= room}
            requests = [Request(index, 0, tokens) for index, tokens in fitting.items()]
            drawn = dict(zip(fitting, sampler(requests, progress) if requests else [], strict=True))
            return [
                _response(row, drawn[row.index].text, drawn[row.index].finished, drawn[row.index].num_tokens)
                if row.index in drawn
                else _response(row, None)
                for row in rows
            ]

        return respond

    def _judge(self, side: Side) -> MakeRows:
        """From responses to rewards."""
        reward = self.job.reward
        scorer = RewardScorer(
            load_reward_model(reward.reward_model_name_or_path, self._reward_options),
            self.reward_tokenizer,
            reward.reward_batch_size,
            reward.reward_max_length,
            self.text_format,
        )

        def judge(rows: Sequence[Row], progress: Callable[[int], Any]) -> list[Row]:
            answered = [row for row in rows if row["response"] is not None]
            scores = scorer([(row["prompt"], row["response"]) for row in answered], progress)
            score_of = {row["index"]: score for row, score in zip(answered, scores, strict=True)}
            found = [score_of.get(row["index"]) for row in rows]
            return [
                {"index": row["index"], "reward": score and score.reward, "cut": bool(score and score.was_cut)}
                for row, score in zip(rows, found, strict=True)
            ]

        return judge

    def _pair_scorer(self, side: Side) -> MakeRows:
        """From pairs to log-probabilities; None for pairs whose prompt leaves no room."""
        model, limit = load_policy(side.model, side.options), self._max_length(side)

        def score(pairs: Sequence[PairRow], progress: Callable[[int], Any]) -> list[Row]:
            tokens = [tokenize_answers(p.prompt, (p.chosen, p.rejected), side.tokenizer, limit) for p in pairs]
            readable = [place for place, answers in enumerate(tokens) if is_readable(answers)]
            flat = [answer for place in readable for answer in tokens[place]]
            scores = iter(answer_scores(model, flat, self.job.policy.batch_size, lambda count: progress(count // 2)))
            found = {place: (next(scores), next(scores)) for place in readable}
            rows = []
            for place, pair in enumerate(pairs):
                row: Row = {"index": pair.index, "cut": place in found and any(a.was_cut for a in tokens[place])}
                for number, answer in enumerate(("chosen", "rejected")):
                    one = found[place][number] if place in found else None
                    row |= {f"{answer}_logp": one and one.logp, f"{answer}_length": one and one.num_tokens}
                rows.append(row)
            return rows

        return score

    def _max_length(self, side: Side) -> int | None:
        window = getattr(read_config(side.model, side.options).get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (window, self.job.data.max_length) if limit is not None]
        return min(limits, default=None)

    def _options(self, revision: str, dtype: str, attention: str | None = None) -> LoadOptions:
        return LoadOptions(revision, dtype, attention, self.job.policy.trust_remote_code, self.device.type)

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
        job = self.job
        self._reward_options = self._options(job.reward.reward_model_revision, job.reward.reward_dtype)
        name = job.reward.reward_model_name_or_path
        check_reward_model(name, self._reward_options)
        self.reward_tokenizer = load_tokenizer(name, self._reward_options)
        self.text_format = resolve_text_format(job.reward.reward_text_format, self.reward_tokenizer)
        for side in self.sides.values():
            if side.responses is None:
                if job.policy.use_vllm:
                    require_vllm()
                stop_tokens(load_generation_config(side.model, side.options), side.tokenizer)
                room_for_prompt(read_config(side.model, side.options), job.policy.max_new_tokens, None)
                self._require_template(side, [row.prompt for row in self.prompts], "prompts")

    def _check_pairs(self) -> None:
        for side in self.sides.values():
            if side.model is not None:
                self._require_template(side, [pair.prompt for pair in self.pairs], "pairs")

    def _require_template(self, side: Side, prompts: Sequence[Any], what: str) -> None:
        if not side.tokenizer.chat_template and any(not isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"the {what} are conversations and the {side.name}'s tokenizer has no chat template: set "
                "tokenizer.chat_template and save it with the model, or give strings."
            )

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the shards, up to rounding: neither batch sizes nor the device."""
        job = self.job
        policy, data, reward = job.policy, job.data, job.reward
        chosen: list[tuple[Any, tuple[str, ...]]] = [
            (policy, ("model_name_or_path", "model_revision", "ref_model_name_or_path", "ref_model_revision", "dtype"))
        ]
        settings: dict[str, Any] = {"seed": job.output.seed}
        if job.has_duel:
            settings["prompts_checksum"] = checksum_of([row.prompt for row in self.prompts])
            for side in self.sides.values():
                settings[f"responses_checksum_{side.name}"] = side.responses and checksum_of(side.responses)
            settings["reward_text_format"] = self.text_format
            names = ("model_name_or_path", "model_revision", "dtype", "max_length")
            chosen.append((reward, tuple(f"reward_{name}" for name in names)))
            chosen.append((policy, ("temperature", "top_p", "max_new_tokens", "use_vllm")))
            chosen.append((data, ("prompts", "responses", "ref_responses")))
        if job.has_pairs:
            settings["pairs_checksum"] = checksum_of([[p.prompt, p.chosen, p.rejected] for p in self.pairs])
            chosen.append((data, ("dataset_name", "dataset_split", "max_length")))
        return settings | {name: getattr(group, name) for group, names in chosen for name in names}


def _response(row: PromptRow, text: str | None, finished: bool | None = None, num_tokens: int | None = None) -> Row:
    """A line of a shard. text: None where the prompt is too long. finished, num_tokens: None where nobody counted."""
    return {"index": row.index, "prompt": row.prompt, "response": text, "finished": finished, "tokens": num_tokens}
