"""Preference pairs by rejection sampling: draw responses, score them, select, and write a data set with its card.

What can be refused is refused before any model is loaded: arguments, columns, types, conversations that ask for no
answer. A row of a shard is a JSON object: index and prompt always; after "generate" also responses and finished; after
"score" scores and cut; "select" keeps pairs and counts. Every row is a function of its prompt, its index and the
settings, and so is what is written: no date, no time taken, no name of a machine. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
from transformers.hf_argparser import HfArg

from hf_moe_cpt.data.rejection_sampling import PAIRINGS, REWARDS, Selection, SelectionRule, select_pairs
from hf_moe_cpt.data.text import json_columns
from hf_moe_cpt.evaluation.resumable import (
    MakeRows,
    Progress,
    ResumableFolder,
    Row,
    checksum_of_values,
    read_shard,
    write_json,
)
from hf_moe_cpt.generation.sampling import (
    LoadOptions,
    Policy,
    PolicyArguments,
    Prompt,
    RewardArguments,
    check_at_least,
    require_template,
)
from hf_moe_cpt.machine import DEVICES, check_names, choose_device, package_version, release_memory


KIND_OF_EXTENSION = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
ANSWERED_ROLES = ("user", "tool", "system")  # a conversation that ends with one of them asks for an answer


@dataclass
class DataArguments:
    """Which prompts, and what else the data set already has."""

    dataset_name: str = HfArg(help="Prompts: a .jsonl, .json, .parquet or .arrow file, a folder of them, or a Hub id.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a data set on the Hub.")
    dataset_split: str = HfArg(default="train", help="Split to read; slices as train[:1%%] are allowed.")
    prompt_column: str = HfArg(default="prompt", help="Column of strings or of lists of messages.")
    as_chat: bool = HfArg(
        default=False, help="Make each string prompt the turn of a user; the pairs are conversational."
    )
    max_prompts: int | None = HfArg(default=None, help="Read only the first so many rows.")
    responses_column: str | None = HfArg(
        default=None, help="Column with lists of ready responses, in place of --model_name_or_path."
    )
    scores_column: str | None = HfArg(
        default=None, help="Column with lists of their scores, in place of a reward model."
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_prompts")
        if self.scores_column is not None and self.responses_column is None:
            raise ValueError(f"--scores_column {self.scores_column!r} needs --responses_column: scores of what?")


@dataclass
class SamplingArguments(PolicyArguments):
    """How many responses, to which prompts."""

    num_samples: int = HfArg(default=8, help="N: responses drawn for each prompt, at least 2.")
    max_prompt_length: int | None = HfArg(
        default=None, help="Leave out prompts of more tokens; always those that do not fit the model."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 2:
            raise ValueError(f"--num_samples {self.num_samples} makes no pair: draw at least 2 responses per prompt.")
        check_at_least(self, 1, "max_prompt_length")


@dataclass
class SelectionArguments:
    """Which of the responses become pairs."""

    rewards: str = HfArg(
        default="percentile", help=f"What tau is a scale of: {' or '.join(REWARDS)} (ranks in a prompt)."
    )
    tau: float = HfArg(
        default=0.5,
        metadata={"range": "[0, inf]"},
        help="Temperature of the rejection sampling, above 0: near 0 the best are kept, at inf any.",
    )
    num_accepted: int = HfArg(default=4, help="Responses kept for each prompt: at least 2, at most N.")
    pairs: str = HfArg(default="max_min", help=f"How they are paired: {', '.join(PAIRINGS)}.")
    min_margin: float = HfArg(default=0.0, help="Leave out pairs whose scores differ by less; equal ones always.")
    drop_unfinished: bool = HfArg(default=False, help="Leave out responses that were cut at --max_new_tokens.")


@dataclass
class OutputArguments:
    """Where it goes, and how the work is cut."""

    output_dir: str = HfArg(help="A new folder, or one in which this very run was interrupted.")
    seed: int = HfArg(default=0, help="Of drawing, accepting and pairing, together with a prompt's row.")
    shard_size: int = HfArg(default=64, help="Prompts whose work is stored, and resumed, as one.")
    part: str | None = HfArg(
        default=None, help="Generate and score only this share, as 2/4; run once without it when all are done."
    )
    stop_after: str | None = HfArg(
        default=None, help="Stop after generate or score, so that the next start has the memory for itself."
    )
    device: str = HfArg(default="auto", help="auto, cpu or cuda.")
    save_to_disk: bool = HfArg(default=False, help="Also write a folder for datasets.load_from_disk.")
    push_to_hub: str | None = HfArg(default=None, help="Upload the data set to this Hub repository.")
    hub_private: bool = HfArg(default=False, help="Make that repository private if it is new.")

    def __post_init__(self) -> None:
        check_names("--device", [self.device], DEVICES)
        check_names("--stop_after", self.stop_after and [self.stop_after], ("generate", "score"))
        check_at_least(self, 1, "shard_size")
        self.share()

    def share(self) -> tuple[int, int]:
        """(which, of how many), counted from 0; (0, 1) without --part. Raises ValueError for what is no share."""
        if self.part is None:
            return 0, 1
        which, _, many = self.part.partition("/")
        if not (which.isdecimal() and many.isdecimal() and 1 <= int(which) <= int(many)):
            raise ValueError(f"--part {self.part!r} is no share: write 1/4, 2/4, 3/4 and 4/4 for four processes.")
        return int(which) - 1, int(many)


@dataclass
class Job:
    """All arguments of a rejection sampling."""

    data: DataArguments
    policy: SamplingArguments
    reward: RewardArguments
    selection: SelectionArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        data, policy, reward = self.data, self.policy, self.reward
        if (policy.model_name_or_path is None) == (data.responses_column is None):
            raise ValueError(
                f"Give one of --model_name_or_path ({policy.model_name_or_path}) and --responses_column "
                f"({data.responses_column}): the first draws responses, the second reads them."
            )
        if reward.is_given == (data.scores_column is not None):
            raise ValueError(
                f"Give one of --reward_model_name_or_path ({reward.reward_model_name_or_path}), --reward_function "
                f"({reward.reward_function}) and --scores_column ({data.scores_column}): the first two score "
                "responses, the third reads their scores."
            )
        if data.responses_column is None and self.selection.num_accepted > policy.num_samples:
            raise ValueError(
                f"--num_accepted {self.selection.num_accepted} is more than --num_samples {policy.num_samples}: "
                "accept fewer or draw more."
            )
        self.rule()

    def rule(self) -> SelectionRule:
        """What the selection does. Raises ValueError for values that mean nothing."""
        chosen = asdict(self.selection)
        del chosen["drop_unfinished"]
        return SelectionRule(**chosen, seed=self.output.seed)


@dataclass(frozen=True)
class PromptRow:
    """One prompt; index is its row in the data set. responses (N,) and scores (N,) where the data set has them."""

    index: int
    prompt: Prompt
    responses: list[str] | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; as_chat: a string prompt becomes the turn of a user."""

    prompt: str = "prompt"
    responses: str | None = None
    scores: str | None = None
    as_chat: bool = False

    def names(self) -> list[str]:
        """Those that are asked for."""
        return [name for name in (self.prompt, self.responses, self.scores) if name is not None]


def load_table(name: str, split: str = "train", config_name: str | None = None) -> datasets.Dataset:
    """The rows of a .jsonl, .json, .parquet or .arrow file, a folder of them or from save_to_disk, or a Hub id.

    Of a folder: the files with the split in their path (train.parquet, test/a.jsonl); all, where no path has one.
    ID:CONFIGURATION or ID:CONFIGURATION:SPLIT, where ID is of the Hub or a folder in its layout, names both here.
    """
    path = Path(name).expanduser()
    if not path.exists() and ":" in name:
        place, config_name, *rest = name.split(":")
        split = rest[0] if rest and rest[0] else split
        with _named(name, split):
            return datasets.load_dataset(place, config_name or None, split=split)
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    if path.exists():
        files = _files_of_folder(path, split.partition("[")[0]) if path.is_dir() else [path]
        return _load_files(files, name, split)
    if path.suffix.lower() in KIND_OF_EXTENSION or path.is_absolute() or name.startswith("."):  # no id of the Hub
        raise ValueError(f"the data set {name!r} is no file or folder here: check the path.")
    with _named(name, split):
        return datasets.load_dataset(name, config_name, split=split)


@contextmanager
def _named(name: object, split: str) -> Iterator[None]:
    """Give the errors of `datasets` the name of what was read, in one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"the data set {str(name)!r} (split {split!r}) cannot be read: {line}") from error


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Not left to `datasets`: it goes by the folder's name and card, and may load what it cached of another folder."""
    words_of_file = {
        path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower()))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in KIND_OF_EXTENSION
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    chosen = [path for path, words in words_of_file.items() if split in words]
    if not chosen and split == "train":
        chosen = [path for path, words in words_of_file.items() if not words & SPLITS]
    if not chosen:
        raise ValueError(f"the folder {folder} has no {', '.join(KIND_OF_EXTENSION)} file of the split {split!r}.")
    return chosen


def _load_files(files: list[Path], name: str, split: str) -> datasets.Dataset:
    kinds = {KIND_OF_EXTENSION.get(path.suffix.lower()) for path in files}
    if len(kinds) > 1 or None in kinds:
        found = sorted({path.suffix for path in files})
        raise ValueError(f"{name} has the extension(s) {found}: give one kind of {', '.join(KIND_OF_EXTENSION)}.")
    if kinds == {"json"}:
        for path in files:
            json_columns(path)  # pyarrow ends the process for a file of another form
    data_files = {split.partition("[")[0]: [str(path.resolve()) for path in files]}
    with _named(name, split):
        return datasets.load_dataset(kinds.pop(), data_files=data_files, split=split)


def _saved(path: Path, split: str) -> datasets.Dataset:
    with _named(path, split):
        saved = datasets.load_from_disk(str(path))
    if "[" in split:
        raise ValueError(f"split {split!r}: a saved data set cannot be sliced, use --max_prompts.")
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"the saved data set {path} has the splits {list(saved)}, not {split!r}: choose one of them.")
    return saved[split]


def read_rows(table: datasets.Dataset, columns: Columns, max_prompts: int | None = None) -> list[PromptRow]:
    """The first `max_prompts` rows, checked one by one. Raises ValueError for the first that cannot be used."""
    for name in columns.names():
        if name not in table.column_names:
            raise ValueError(f"the data set has no column {name!r} but {table.column_names}: name the right one.")
    count = len(table) if max_prompts is None else min(max_prompts, len(table))
    if count == 0:
        raise ValueError("the data set has no rows: there is nothing to sample.")
    selected = table.select(range(count)).select_columns(columns.names()).with_format(None)
    rows = [_read_row(index, row, columns) for index, row in enumerate(selected)]
    kinds = {isinstance(row.prompt, str) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"column {columns.prompt!r} mixes strings and conversations: bring them into one form.")
    return rows


def _read_row(index: int, row: dict[str, Any], columns: Columns) -> PromptRow:
    where = f"row {index} (counted from 0)"
    prompt = _read_prompt(row[columns.prompt], f"{where} of column {columns.prompt!r}")
    if columns.as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    responses = scores = None
    if columns.responses is not None:
        responses = [text_of(item) for item in _items(row[columns.responses])]
        if None in responses:
            raise ValueError(
                f"{where} of column {columns.responses!r} is no list of responses: each is a string or one message."
            )
    if columns.scores is not None:
        scores = list(_items(row[columns.scores]))
        if not all(_is_number(score) for score in scores):
            raise ValueError(
                f"{where} of column {columns.scores!r} is no list of finite numbers: give one per response."
            )
        if len(scores) != len(responses or ()):
            raise ValueError(
                f"{where} has {len(responses or ())} responses and {len(scores)} scores: give a score per response."
            )
        scores = [float(score) for score in scores]
    return PromptRow(index, prompt, responses, scores)


def _read_prompt(value: object, where: str) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where} is empty: remove that row.")
        return value
    turns = read_messages(value)
    if turns is None:
        raise ValueError(f"{where} is neither a string nor a list of messages with role and content.")
    if turns[-1]["role"] not in ANSWERED_ROLES:
        raise ValueError(
            f"{where} ends with a message of {turns[-1]['role']!r}: end it with one that asks, as 'user'."
        )
    return turns


def read_messages(value: object) -> list[dict[str, str]] | None:
    """A list of messages without empty fields; None for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [{name: part for name, part in turn.items() if part is not None} for turn in value]
    return turns if all(isinstance(turn.get(name), str) for turn in turns for name in ("role", "content")) else None


def text_of(value: object) -> str | None:
    """A response: a string, or the content of its one message; None for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _items(value: object) -> Iterator[Any]:
    """The elements of a list; nothing for anything else."""
    return iter(value if isinstance(value, list) else [])


STAGES = ("generate", "score", "select")
FORMAT = 1  # of the shards; a folder of another format is refused
Settings = dict[str, dict[str, Any]]  # by stage


class SampleFolder(ResumableFolder):
    """rejection_sample.json (the settings of each stage), stages/<stage>/<number>-<fingerprint>.jsonl (a line for each
    prompt), then data/, README.md and summary.json.
    """

    def __init__(self, root: str | Path, settings: Settings) -> None:
        super().__init__(
            root, "rejection_sample.json", {stage: {"format": FORMAT, **settings[stage]} for stage in STAGES}
        )

    def shard(self, stage: str, number: int) -> str:
        """Name of a shard, with a hash of the settings of its stage and of all before it, which made it."""
        past = [self.settings[name] for name in STAGES[: STAGES.index(stage) + 1]]
        fingerprint = hashlib.sha256(json.dumps(past, sort_keys=True).encode()).hexdigest()[:8]
        return f"stages/{stage}/{number:05d}-{fingerprint}.jsonl"

    def rows(self, stage: str, number: int) -> list[Row]:
        """The rows of a finished shard."""
        return read_shard(self.root / self.shard(stage, number))

    def remedy(self, changed: str) -> str:
        """How the stages before the one that changed can be used again."""
        if changed == STAGES[0]:
            return ""
        kept = STAGES[STAGES.index(changed) - 1]
        reuse = f"--dataset_name {self.root / 'stages' / kept} --responses_column responses"
        return f" and reuse the work of this one with {reuse}" + (" --scores_column scores" if kept == "score" else "")


class Work:
    """The checked inputs of a job and the stages over their shards. Raises ValueError before any weight is read."""

    def __init__(self, job: Job) -> None:
        self.job, self.policy, self.reward = job, None, None
        policy, data, device = job.policy, job.data, job.output.device
        if policy.model_name_or_path is not None:
            options = LoadOptions(
                policy.model_revision, policy.dtype, policy.attn_implementation, policy.trust_remote_code, device
            )
            drawn = policy.num_samples, job.output.seed, policy.max_prompt_length
            self.policy = Policy(policy.model_name_or_path, options, policy, *drawn)
        if job.reward.is_given:
            self.reward = job.reward.scorer(policy.trust_remote_code, device)
        columns = Columns(data.prompt_column, data.responses_column, data.scores_column, data.as_chat)
        table = load_table(data.dataset_name, data.dataset_split, data.dataset_config)
        rows = read_rows(table, columns, data.max_prompts)
        self._check_rows(rows)
        size = job.output.shard_size
        self.shards = [rows[start : start + size] for start in range(0, len(rows), size)]
        checksum = checksum_of_values([[row.prompt, row.responses, row.scores] for row in rows])
        self.folder = SampleFolder(job.output.output_dir, stage_settings(job, checksum))

    def run_stage(self, stage: str, numbers: Sequence[int]) -> None:
        """Make the shards of a stage that are missing."""

        def load() -> MakeRows:
            make = {"generate": self._generator, "score": self._scorer, "select": lambda: self._select}[stage]()
            return lambda place, progress: make(numbers[place], progress)

        sizes = {self.folder.shard(stage, number): self._size(stage, number) for number in numbers}
        self.folder.make_rows(stage, sizes, load, "prompt" if stage == "select" else "response")
        release_memory(choose_device(self.job.output.device))  # before the next stage loads its own model

    def _size(self, stage: str, number: int) -> int:
        """Items of a shard, for the progress bar."""
        rows, drawn = self.shards[number], self.job.policy.num_samples
        if stage == "select":
            return len(rows)
        return sum(drawn if row.responses is None else len(row.responses) for row in rows)

    def _generator(self) -> MakeRows:
        """With the policy, or from the column of ready responses."""
        sampler = None if self.policy is None else self.policy.load()

        def generate(number: int, progress: Progress) -> list[Row]:
            rows = self.shards[number]
            if sampler is None:
                progress(self._size("generate", number))
                return [{"index": row.index, "prompt": row.prompt, "responses": row.responses} for row in rows]
            drawn = self.policy.respond(sampler, {row.index: row.prompt for row in rows}, progress)
            return [
                {
                    "index": row.index,
                    "prompt": row.prompt,
                    "responses": [response.text for response in drawn[row.index]],
                    "finished": [response.finished for response in drawn[row.index]],
                    "too_long": not drawn[row.index],
                }
                for row in rows
            ]

        return generate

    def _scorer(self) -> MakeRows:
        """With the reward model, or from the column of ready scores."""
        scorer = None if self.reward is None else self.reward.load()

        def score(number: int, progress: Progress) -> list[Row]:
            rows = self.folder.rows("generate", number)
            if scorer is None:
                progress(self._size("score", number))
                return [row | {"scores": source.scores} for row, source in zip(rows, self.shards[number], strict=True)]
            scores = iter(scorer([(row["prompt"], text) for row in rows for text in row["responses"]], progress))
            scored = [[next(scores) for _ in row["responses"]] for row in rows]
            return [
                row | {"scores": [score.reward for score in mine], "cut": sum(score.was_cut for score in mine)}
                for row, mine in zip(rows, scored, strict=True)
            ]

        return score

    def _select(self, number: int, progress: Progress) -> list[Row]:
        """Pairs of each prompt, with the counts of the summary."""
        rule, drop = self.job.rule(), self.job.selection.drop_unfinished
        rows = []
        for row in self.folder.rows("score", number):
            finished = row.get("finished") or [True] * len(row["responses"])
            places = [place for place, is_finished in enumerate(finished) if is_finished or not drop]
            texts = [row["responses"][place] for place in places]
            scores = [row["scores"][place] for place in places]
            rows.append(_selected(row, texts, scores, select_pairs(texts, scores, row["index"], rule)))
            progress(1)
        return rows

    def _check_rows(self, rows: list[PromptRow]) -> None:
        if self.policy is not None:
            require_template(self.policy.tokenizer, [row.prompt for row in rows], "prompts")
            return
        most = max(len(row.responses) for row in rows)
        if self.job.selection.num_accepted > most:
            raise ValueError(
                f"--num_accepted {self.job.selection.num_accepted} is more than the {most} response(s) that "
                f"column {self.job.data.responses_column!r} has at most: accept fewer."
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
        score |= {"reward_function": reward.reward_function} if reward.reward_function is not None else {}
    select = {**vars(job.selection), "seed": job.output.seed}
    return {"generate": generate, "score": score, "select": select}


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
    return {
        "index": row["index"],
        "prompt": row["prompt"],
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


DATA_FILE = "data/train.parquet"
TEXTS = ("README.md", "summary.json")  # with it all that is published


def preference_rows(selected: Iterable[Row]) -> list[Row]:
    """One row per pair, in the explicit-prompt format of TRL: strings, or messages where the prompt is messages."""
    rows = []
    for prompt in selected:
        for pair in prompt["pairs"]:
            texts = {side: pair[side] for side in ("chosen", "rejected")}
            if not isinstance(prompt["prompt"], str):
                texts = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
            scores = {name: pair[name] for name in ("score_chosen", "score_rejected")}
            rows.append({"prompt": prompt["prompt"], **texts, **scores})
    return rows


def summarize(selected: Sequence[Row]) -> dict[str, Any]:
    """Counts and means of a run. Means over pairs or prompts of which there are none are None."""
    pairs = [pair for row in selected for pair in row["pairs"]]
    with_pairs = [row for row in selected if row["pairs"]]

    def total(name: str) -> int:
        return sum(row[name] for row in selected)

    def over_pairs(value: Callable[[Row], float]) -> float | None:
        return statistics.fmean(map(value, pairs)) if pairs else None

    rates = [row["acceptance"] for row in selected if row["acceptance"] is not None]
    scores = [score for row in selected for score in row["scores"]]
    return {
        "prompts": len(selected),
        "prompts_with_pairs": len(with_pairs),
        "prompts_too_long": sum(row["too_long"] for row in selected),
        "prompts_with_fewer_than_two_distinct": sum(row["distinct"] < 2 and not row["too_long"] for row in selected),
        "prompts_without_margin": sum(row["distinct"] >= 2 and not row["pairs"] for row in selected),
        "responses": total("responses"),
        "responses_unfinished": total("unfinished"),
        "responses_cut_for_reward_model": total("cut"),
        "dropped_unfinished": total("dropped_unfinished"),
        "dropped_empty": total("dropped_empty"),
        "dropped_identical": total("dropped_identical"),
        "accepted": total("accepted"),
        "acceptance_rate": statistics.fmean(rates) if rates else None,
        "pairs": len(pairs),
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_score_chosen": over_pairs(lambda pair: pair["score_chosen"]),
        "mean_score_rejected": over_pairs(lambda pair: pair["score_rejected"]),
        "mean_characters_chosen": over_pairs(lambda pair: len(pair["chosen"])),
        "mean_characters_rejected": over_pairs(lambda pair: len(pair["rejected"])),
        "share_of_pairs_with_longer_chosen": over_pairs(lambda pair: len(pair["chosen"]) > len(pair["rejected"])),
    }


def write_output(root: Path, selected: Sequence[Row], settings: Settings, save_to_disk: bool) -> dict[str, Any]:
    """Write data, card and summary, in that order, and return the summary.

    save_to_disk: also write the folder arrow/ for `datasets.load_from_disk`. Raises ValueError if no pair is left.
    """
    summary = summarize(selected)
    if not summary["pairs"]:
        raise ValueError(
            f"no pair is left of {summary['prompts']} prompts: {summary['prompts_with_fewer_than_two_distinct']} with "
            f"fewer than two distinct responses, {summary['prompts_without_margin']} without the margin, "
            f"{summary['prompts_too_long']} too long; sample more, or hotter, or ask for a smaller margin."
        )
    data = datasets.Dataset.from_list(preference_rows(selected))
    path = root / DATA_FILE
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    data.to_parquet(str(partial))
    os.replace(partial, path)
    if save_to_disk:
        _save_to_disk(data, root / "arrow")
    (root / "README.md").write_text(card(settings, summary), encoding="utf-8")
    write_json(root / "summary.json", summary)
    return summary


def _save_to_disk(data: datasets.Dataset, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    data.save_to_disk(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def card(settings: Settings, summary: dict[str, Any]) -> str:
    """The README.md of the data set: what it was made of."""
    tables = {stage: _table("setting", settings[stage]) for stage in settings}
    # No `configs:` in its head: `datasets` 5.2 takes two local folders of one name with the same `configs:` for one
    # data set and loads the cached rows of the first for both. It finds data/train.parquet by its name.
    form = resources.files("hf_moe_cpt.hub_cards").joinpath("preference_pairs.md").read_text(encoding="utf-8")
    return form.format(version=package_version("hf_moe_cpt"), counts=_table("count", summary), **tables, **summary)


def _table(head: str, values: dict[str, Any]) -> str:
    shown = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    lines = [f"| `{name}` | {text.replace('|', '&#124;')} |" for name, text in shown.items() if text != "None"]
    return "\n".join([f"| {head} | value |", "|---|---|", *lines])


def run(job: Job) -> str:
    """Check everything, then make what is missing, stage by stage; the lines to print at the end."""
    work = Work(job)
    root = work.folder.root
    work.folder.claim()
    which, many = job.output.share()
    mine = range(len(work.shards))[which::many]
    work.run_stage("generate", mine)
    if job.output.stop_after != "generate":
        work.run_stage("score", mine)
    if job.output.part is not None or job.output.stop_after is not None:
        return f"{root} holds what was asked for; start again without --part and --stop_after to go on."
    work.run_stage("select", mine)
    selected = [row for number in mine for row in work.folder.rows("select", number)]
    summary = write_output(root, selected, work.folder.settings, job.output.save_to_disk)
    return "\n".join([f"{name:<38} {value}" for name, value in summary.items()] + [f"written to {root}"])
