"""What the stages of the rejection sampling do to one shard: draw responses, score them, select pairs. Source: ours.

A row of a shard is a JSON object: index and prompt always; after "generate" also responses and finished; after "score"
scores and cut; "select" keeps pairs and counts. Every row is a function of its prompt, its index and the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_moe_cpt.data.rejection_sampling import Selection, select_pairs
from hf_moe_cpt.scripts.rejection_sample_data import Columns, PromptRow, checksum, load_table, read_rows, shards
from hf_moe_cpt.scripts.rejection_sample_folder import SampleFolder, Settings
from hf_moe_cpt.scripts.rejection_sample_generation import (
    Sampling,
    TransformersSampler,
    encode_prompt,
    load_vllm,
    requests_for,
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
    from hf_moe_cpt.scripts.rejection_sample import Job

Row = dict[str, Any]
Make = Callable[[int, Callable[[int], Any]], list[Row]]


class Work:
    """The checked inputs of a job and the stages over their shards. Raises ValueError before any weight is read."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sampling = Sampling(
            job.policy.num_samples,
            job.policy.temperature,
            job.policy.top_p,
            job.policy.max_new_tokens,
            job.output.seed,
        )
        self._check_models()
        data = job.data
        columns = Columns(data.prompt_column, data.responses_column, data.scores_column, data.as_chat)
        table = load_table(data.dataset_name, data.dataset_split, data.dataset_config)
        rows = read_rows(table, columns, data.max_prompts)
        self._check_rows(rows)
        self.shards = shards(rows, job.output.shard_size)
        self.folder = SampleFolder(job.output.output_dir, stage_settings(job, checksum(rows)))

    def size(self, stage: str, number: int) -> int:
        """Items of a shard, for the progress bar."""
        rows = self.shards[number]
        if stage == "select":
            return len(rows)
        return sum(self.sampling.num_samples if row.responses is None else len(row.responses) for row in rows)

    def load_generator(self) -> Make:
        """The stage "generate": with the policy, or from the column of ready responses."""
        if self.job.data.responses_column is not None:
            return self._copy_responses
        name, options = self.job.policy.model_name_or_path, self._policy_options
        if self.job.policy.use_vllm:
            engine = self.job.policy.engine_options()
            sampler = load_vllm(name, options, engine, self.tokenizer, self.sampling, self.stop)
        else:
            model = load_policy(name, options)
            batch_size = self.job.policy.batch_size
            sampler = TransformersSampler(model, self.tokenizer, self.sampling, self.stop, batch_size)

        def generate(number: int, progress: Callable[[int], Any]) -> list[Row]:
            ids = {row.index: encode_prompt(row.prompt, self.tokenizer) for row in self.shards[number]}
            fitting = {index: tokens for index, tokens in ids.items() if self.room is None or len(tokens) <= self.room}
            requests = [r for index, tokens in fitting.items() for r in requests_for(index, tokens, self.sampling)]
            progress((len(ids) - len(fitting)) * self.sampling.num_samples)
            drawn: dict[int, list] = {index: [] for index in ids}
            for request, response in zip(requests, sampler(requests, progress), strict=True):
                drawn[request.prompt_index].append(response)
            return [
                _row(row)
                | {"responses": [response.text for response in drawn[row.index]]}
                | {"finished": [response.finished for response in drawn[row.index]]}
                | {"too_long": row.index not in fitting}
                for row in self.shards[number]
            ]

        return generate

    def _copy_responses(self, number: int, progress: Callable[[int], Any]) -> list[Row]:
        progress(self.size("generate", number))
        return [_row(row) | {"responses": row.responses} for row in self.shards[number]]

    def load_scorer(self) -> Make:
        """The stage "score": with the reward model, or from the column of ready scores."""
        if self.job.data.scores_column is not None:
            return self._copy_scores
        reward = self.job.reward
        model = load_reward_model(reward.reward_model_name_or_path, self._reward_options)
        scorer = RewardScorer(
            model, self.reward_tokenizer, reward.reward_batch_size, reward.reward_max_length, self.text_format
        )

        def score(number: int, progress: Callable[[int], Any]) -> list[Row]:
            rows = self.folder.read("generate", number)
            scores = iter(scorer([(row["prompt"], text) for row in rows for text in row["responses"]], progress))
            scored = [[next(scores) for _ in row["responses"]] for row in rows]
            return [
                row | {"scores": [score.reward for score in mine], "cut": sum(score.was_cut for score in mine)}
                for row, mine in zip(rows, scored, strict=True)
            ]

        return score

    def _copy_scores(self, number: int, progress: Callable[[int], Any]) -> list[Row]:
        progress(self.size("score", number))
        rows = zip(self.folder.read("generate", number), self.shards[number], strict=True)
        return [row | {"scores": source.scores} for row, source in rows]

    def select(self, number: int, progress: Callable[[int], Any]) -> list[Row]:
        """The stage "select": pairs of each prompt, with the counts of the summary."""
        rule, drop = self.job.rule(), self.job.selection.drop_unfinished
        rows = []
        for row in self.folder.read("score", number):
            finished = row.get("finished") or [True] * len(row["responses"])
            places = [place for place, is_finished in enumerate(finished) if is_finished or not drop]
            texts = [row["responses"][place] for place in places]
            scores = [row["scores"][place] for place in places]
            rows.append(_selected(row, texts, scores, select_pairs(texts, scores, row["index"], rule)))
            progress(1)
        return rows

    def _check_models(self) -> None:
        policy, reward = self.job.policy, self.job.reward
        device, trust = self.job.output.device, policy.trust_remote_code
        if policy.model_name_or_path is not None:
            if policy.use_vllm:
                require_vllm()
            options = LoadOptions(policy.model_revision, policy.dtype, policy.attn_implementation, trust, device)
            self._policy_options = options
            self.tokenizer = load_tokenizer(policy.model_name_or_path, options)
            generation = load_generation_config(policy.model_name_or_path, options)
            self.stop = stop_tokens(generation, self.tokenizer)
            config = read_config(policy.model_name_or_path, options)
            self.room = room_for_prompt(config, policy.max_new_tokens, policy.max_prompt_length)
        if reward.reward_model_name_or_path is not None:
            name = reward.reward_model_name_or_path
            options = LoadOptions(reward.reward_model_revision, reward.reward_dtype, None, trust, device)
            self._reward_options = options
            check_reward_model(name, options)
            self.reward_tokenizer = load_tokenizer(name, options)
            self.text_format = resolve_text_format(reward.reward_text_format, self.reward_tokenizer)

    def _check_rows(self, rows: list[PromptRow]) -> None:
        if self.job.data.responses_column is not None:
            most = max(len(row.responses) for row in rows)
            if self.job.selection.num_accepted > most:
                raise ValueError(
                    f"--num_accepted {self.job.selection.num_accepted} is more than the {most} response(s) that "
                    f"column {self.job.data.responses_column!r} has at most: accept fewer."
                )
        elif not isinstance(rows[0].prompt, str) and not self.tokenizer.chat_template:
            raise ValueError(
                "the prompts are conversations and the policy's tokenizer has no chat template: set "
                "tokenizer.chat_template and save it with the policy, or give strings."
            )


def stage_settings(job: Job, data_checksum: str) -> Settings:
    """Everything that decides what a stage writes, up to rounding: neither batch sizes nor the device are in it."""
    data, policy, reward = job.data, job.policy, job.reward
    generate: Row = {
        name: getattr(data, name)
        for name in ("dataset_name", "dataset_config", "dataset_split", "prompt_column", "as_chat", "max_prompts")
    } | {"data_checksum": data_checksum, "shard_size": job.output.shard_size}
    if data.responses_column is not None:
        generate["responses_column"] = data.responses_column
    else:
        names = ("model_name_or_path", "model_revision", "dtype", "use_vllm", "num_samples", "temperature", "top_p")
        names += ("max_new_tokens", "max_prompt_length")
        generate |= {name: getattr(policy, name) for name in names} | {"seed": job.output.seed}
    if data.scores_column is not None:
        score: Row = {"scores_column": data.scores_column}
    else:
        names = ("reward_model_name_or_path", "reward_model_revision", "reward_dtype", "reward_text_format")
        score = {name: getattr(reward, name) for name in (*names, "reward_max_length")}
    select = {**vars(job.selection), "seed": job.output.seed}
    return {"generate": generate, "score": score, "select": select}


def _row(row: PromptRow) -> Row:
    return {"index": row.index, "prompt": row.prompt}


def _selected(row: Row, texts: list[str], scores: list[float], selection: Selection) -> Row:
    pairs = [
        {
            "chosen": texts[pair.chosen],
            "rejected": texts[pair.rejected],
            "score_chosen": scores[pair.chosen],
            "score_rejected": scores[pair.rejected],
        }
        for pair in selection.pairs
    ]
    filled = sum(bool(text.strip()) for text in texts)
    return _row(PromptRow(row["index"], row["prompt"])) | {
        "pairs": pairs,
        "scores": scores,
        "acceptance": selection.acceptance,
        "responses": len(row["responses"]),
        "unfinished": sum(not finished for finished in row.get("finished", ())),
        "cut": row.get("cut", 0),
        "too_long": row.get("too_long", False),
        "dropped_unfinished": len(row["responses"]) - len(texts),
        "dropped_empty": len(texts) - filled,
        "dropped_identical": filled - len(selection.distinct),
        "distinct": len(selection.distinct),
        "accepted": len(selection.accepted),
    }
