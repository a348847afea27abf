"""Make preference pairs: sample N responses to each prompt, score them, keep some by rejection sampling, pair these.

hf-moe-cpt rejection-sample \\
    --dataset_name my_prompts.jsonl --model_name_or_path my-policy --reward_model_name_or_path my-reward-model \\
    --num_samples 8 --num_accepted 4 --rewards percentile --tau 0.5 --output_dir pairs

The output folder holds data/train.parquet (prompt, chosen, rejected, score_chosen, score_rejected), its card and
summary.json. A run that was killed continues when it is started again. docs/rejection_sampling.md explains the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.rejection_sampling import PAIRINGS, REWARDS, SelectionRule
from hf_moe_cpt.machine import check_names, choose_device, release_memory


if TYPE_CHECKING:  # these import transformers' models: --help does not wait for them
    from hf_moe_cpt.generation.pairs import Work


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DataArguments:
    """Which prompts, and what else the data set already has."""

    dataset_name: str = field(
        metadata={"help": "Prompts: a .jsonl, .json, .parquet or .arrow file, a folder of them, or a Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read; slices as train[:1%%] are allowed."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of strings or of lists of messages."})
    as_chat: bool = field(
        default=False, metadata={"help": "Make each string prompt the turn of a user; the pairs are conversational."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Read only the first so many rows."})
    responses_column: str | None = field(
        default=None, metadata={"help": "Column with lists of ready responses, in place of --model_name_or_path."}
    )
    scores_column: str | None = field(
        default=None, metadata={"help": "Column with lists of their scores, in place of a reward model."}
    )

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"--max_prompts {self.max_prompts} must be at least 1.")
        if self.scores_column is not None and self.responses_column is None:
            raise ValueError(f"--scores_column {self.scores_column!r} needs --responses_column: scores of what?")


@dataclass
class PolicyArguments:
    """Who answers, and how answers are drawn."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy: a causal language model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the policy's weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub, of both models."})
    num_samples: int = field(default=8, metadata={"help": "N: responses drawn for each prompt, at least 2."})
    temperature: float = field(default=1.0, metadata={"help": "Of the drawing, above 0; 1 is the policy itself."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the likeliest tokens of this total probability."})
    max_new_tokens: int = field(default=512, metadata={"help": "Where a response is cut if it has not ended."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out prompts of more tokens; always those that do not fit the model."}
    )
    batch_size: int = field(default=32, metadata={"help": "Responses generated side by side; vLLM sees to it itself."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM, which must be installed."})
    vllm_options: str = field(
        default="{}", metadata={"help": "Further arguments of vllm.LLM as JSON: '{\"tensor_parallel_size\": 4}'."}
    )

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        if self.num_samples < 2:
            raise ValueError(f"--num_samples {self.num_samples} makes no pair: draw at least 2 responses per prompt.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature} must be above 0 and finite: at 0 all responses are the same."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must lie in (0, 1].")
        for name in ("max_new_tokens", "max_prompt_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        self.engine_options()

    def engine_options(self) -> dict[str, Any]:
        """What --vllm_options holds. Raises ValueError unless it is a JSON object."""
        try:
            options = json.loads(self.vllm_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"--vllm_options {self.vllm_options!r} is no JSON: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"--vllm_options {self.vllm_options!r} must be a JSON object of argument: value.")
        return options


@dataclass
class RewardArguments:
    """Who scores."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sequence classifier with one label, whose logit is the reward."}
    )
    reward_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    reward_dtype: str = field(default="auto", metadata={"help": f"Type of its weights: {', '.join(DTYPES)}."})
    reward_text_format: str = field(
        default="auto",
        metadata={
            "help": "What it reads: chat (its chat template), plain (prompt + response + EOS in one text), pair (as "
            "two texts), or auto: chat where it has a template, plain otherwise."
        },
    )
    reward_max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens it reads; longer texts lose their beginning. Default: its tokenizer's."},
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Texts scored side by side."})

    def __post_init__(self) -> None:
        check_names("--reward_dtype", [self.reward_dtype], DTYPES)
        check_names("--reward_text_format", [self.reward_text_format], ("auto", "chat", "plain", "pair"))
        for name in ("reward_max_length", "reward_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")


@dataclass
class SelectionArguments:
    """Which of the responses become pairs."""

    rewards: str = field(
        default="percentile", metadata={"help": f"What tau is a scale of: {' or '.join(REWARDS)} (ranks in a prompt)."}
    )
    tau: float = field(
        default=0.5,
        metadata={"help": "Temperature of the rejection sampling, above 0: near 0 the best are kept, at inf any."},
    )
    num_accepted: int = field(default=4, metadata={"help": "Responses kept for each prompt: at least 2, at most N."})
    pairs: str = field(default="max_min", metadata={"help": f"How they are paired: {', '.join(PAIRINGS)}."})
    min_margin: float = field(
        default=0.0, metadata={"help": "Leave out pairs whose scores differ by less; equal ones always."}
    )
    drop_unfinished: bool = field(
        default=False, metadata={"help": "Leave out responses that were cut at --max_new_tokens."}
    )


@dataclass
class OutputArguments:
    """Where it goes, and how the work is cut."""

    output_dir: str = field(metadata={"help": "A new folder, or one in which this very run was interrupted."})
    seed: int = field(default=0, metadata={"help": "Of drawing, accepting and pairing, together with a prompt's row."})
    shard_size: int = field(default=64, metadata={"help": "Prompts whose work is stored, and resumed, as one."})
    part: str | None = field(
        default=None,
        metadata={"help": "Generate and score only this share, as 2/4; run once without it when all are done."},
    )
    stop_after: str | None = field(
        default=None,
        metadata={"help": "Stop after generate or score, so that the next start has the memory for itself."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    save_to_disk: bool = field(default=False, metadata={"help": "Also write a folder for datasets.load_from_disk."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload the data set to this Hub repository."})
    hub_private: bool = field(default=False, metadata={"help": "Make that repository private if it is new."})

    def __post_init__(self) -> None:
        check_names("--device", [self.device], ("auto", "cpu", "cuda"))
        check_names("--stop_after", self.stop_after and [self.stop_after], ("generate", "score"))
        if self.shard_size < 1:
            raise ValueError(f"--shard_size {self.shard_size} must be at least 1.")
        self.share()

    def share(self) -> tuple[int, int]:
        """(which, of how many), counted from 0; (0, 1) without --part. Raises ValueError for what is no share."""
        if self.part is None:
            return 0, 1
        which, _, many = self.part.partition("/")
        if not (which.isdecimal() and many.isdecimal() and 1 <= int(which) <= int(many)):
            raise ValueError(f"--part {self.part!r} is no share: write 1/4, 2/4, 3/4 and 4/4 for four processes.")
        return int(which) - 1, int(many)


ARGUMENTS = (DataArguments, PolicyArguments, RewardArguments, SelectionArguments, OutputArguments)


@dataclass
class Job:
    """All arguments of a run."""

    data: DataArguments
    policy: PolicyArguments
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
        if (reward.reward_model_name_or_path is None) == (data.scores_column is None):
            raise ValueError(
                f"Give one of --reward_model_name_or_path ({reward.reward_model_name_or_path}) and --scores_column "
                f"({data.scores_column}): the first scores responses, the second reads their scores."
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


def run_stage(work: Work, stage: str, numbers: Sequence[int], load: Callable[[], Callable], unit: str) -> None:
    """Make the shards of a stage that are missing; `load` is called only if there are any."""
    missing = work.folder.missing(stage, numbers)
    if not missing:
        return
    make = load()
    sizes = {number: work.size(stage, number) for number in numbers}
    done = sum(sizes.values()) - sum(sizes[number] for number in missing)
    with tqdm(total=sum(sizes.values()), initial=done, desc=stage, unit=unit, mininterval=1) as bar:
        for number in missing:
            done += sizes[number]
            work.folder.write(stage, number, make(number, bar.update))
            bar.update(done - bar.n)  # prompts that were left out
    del make  # and with it the model, before the next stage loads its own
    release_memory(choose_device(work.job.output.device))


def run(job: Job) -> None:
    """Check everything, then make what is missing, stage by stage."""
    from hf_moe_cpt.generation.pairs import Work, publish, write_output

    work = Work(job)
    work.folder.claim()
    which, many = job.output.share()
    mine = range(len(work.shards))[which::many]
    run_stage(work, "generate", mine, work.load_generator, "response")
    if job.output.stop_after != "generate":
        run_stage(work, "score", mine, work.load_scorer, "response")
    if job.output.part is not None or job.output.stop_after is not None:
        print(f"{work.folder.root} holds what was asked for; start again without --part and --stop_after to go on.")
        return
    run_stage(work, "select", mine, lambda: work.select, "prompt")
    selected = [row for number in mine for row in work.folder.read("select", number)]
    summary = write_output(work.folder.root, selected, work.folder.settings, job.output.save_to_disk)
    print("\n".join(f"{name:<38} {value}" for name, value in summary.items()))
    print(f"written to {work.folder.root}")
    if job.output.push_to_hub is not None:
        print(f"published at {publish(work.folder.root, job.output.push_to_hub, job.output.hub_private)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, sample, score, select, write."""
    run(Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt rejection-sample", description=__doc__)))


if __name__ == "__main__":
    run_script(main)
