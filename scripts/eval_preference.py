"""Judge a policy against a reference by a reward model, and by how it ranks the answers of preference pairs.

hf-moe-cpt eval-preference \\
    --model_name_or_path my-policy --ref_model_name_or_path my-start --reward_model_name_or_path my-reward-model \\
    --prompts prompts.jsonl --dataset_name my-preference-pairs --output_dir evaluation

Win rate with ties as halves, the same at equal lengths, rewards and lengths; and the accuracies of the policy's
log-probabilities on pairs. A run that was killed continues when it is started again. docs/eval_preference.md explains
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_moe_cpt.arguments import json_object, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import check_names
from hf_moe_cpt.scripts.rejection_sample import DTYPES, RewardArguments


STAGES = (
    "responses-policy",
    "responses-reference",
    "rewards-policy",
    "rewards-reference",
    "logps-policy",
    "logps-reference",
)


@dataclass
class PolicyArguments:
    """Who is judged against whom, and how responses are drawn."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy: a causal language model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference, such as the model that training started from."}
    )
    ref_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights of both: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub, of all models."})
    temperature: float = field(default=0.7, metadata={"help": "Of the drawing, above 0; 0.01 is nearly greedy."})
    top_p: float = field(default=0.9, metadata={"help": "Draw from the likeliest tokens of this total probability."})
    max_new_tokens: int = field(default=512, metadata={"help": "Where a response is cut if it has not ended."})
    batch_size: int = field(default=16, metadata={"help": "Sequences side by side, of responses and of pairs."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM, which must be installed."})
    vllm_options: str = field(
        default="{}", metadata={"help": "Further arguments of vllm.LLM as JSON: '{\"gpu_memory_utilization\": 0.4}'."}
    )

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be above 0 and finite; 0.01 is nearly greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must lie in (0, 1].")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        json_object("--vllm_options", self.vllm_options)


@dataclass
class DataArguments:
    """Prompts and responses for the win rate, pairs for the accuracies; each a .jsonl, .parquet, ..., or a Hub id."""

    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to respond to; if not given, those of --responses, else of --dataset_name."},
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of --prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Its column of strings or of lists of messages."})
    as_chat: bool = field(default=False, metadata={"help": "Make each string of --prompts the turn of a user."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use only the first so many prompts."})
    responses: str | None = field(
        default=None, metadata={"help": "The policy's ready responses: rows of prompt and response."}
    )
    ref_responses: str | None = field(default=None, metadata={"help": "The reference's, to the same prompts."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference pairs: prompt, chosen, rejected, as for DPO."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of pairs on the Hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split of the pairs."})
    max_pairs: int | None = field(default=None, metadata={"help": "Use only the first so many pairs."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt and answer; longer ones are cut. Default: the model's."},
    )

    def __post_init__(self) -> None:
        for name, least in (("max_prompts", 1), ("max_pairs", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} {value} must be at least {least}.")


@dataclass
class OutputArguments:
    """Where it goes, and how it is counted."""

    output_dir: str = field(metadata={"help": "A new folder, or one in which this very run was interrupted."})
    seed: int = field(default=0, metadata={"help": "Of the responses, together with a prompt's row."})
    tie_margin: float = field(default=0.0, metadata={"help": "Rewards no further apart than this are a tie."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    shard_size: int = field(default=64, metadata={"help": "Prompts or pairs whose work is stored as one."})
    stop_after: str | None = field(
        default=None, metadata={"help": f"Stop there, to go on in a fresh process: {', '.join(STAGES)}."}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        check_names("--device", [self.device], ("auto", "cpu", "cuda"))
        check_names("--stop_after", self.stop_after and [self.stop_after], STAGES)
        if self.shard_size < 1:
            raise ValueError(f"--shard_size {self.shard_size} must be at least 1.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence {self.confidence} must lie in (0, 1), such as 0.95.")
        if not 0 <= self.tie_margin < float("inf"):
            raise ValueError(f"--tie_margin {self.tie_margin} must be at least 0.")


ARGUMENTS = (PolicyArguments, DataArguments, RewardArguments, OutputArguments)


@dataclass
class Job:
    """All arguments of a run."""

    policy: PolicyArguments
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
        if self.has_duel:
            self._check_duel()
        else:
            for name in ("prompts", "responses", "ref_responses"):
                if getattr(self.data, name) is not None:
                    raise ValueError(f"--{name} needs --reward_model_name_or_path: who judges the responses?")

    def _check_duel(self) -> None:
        data, policy = self.data, self.policy
        sides = {
            "policy": ("model_name_or_path", "responses"),
            "reference": ("ref_model_name_or_path", "ref_responses"),
        }
        for who, (model, responses) in sides.items():
            has_model, has_responses = getattr(policy, model) is not None, getattr(data, responses) is not None
            if not (has_model or has_responses):
                raise ValueError(f"the win rate needs a {who}: give --{model}, or --{responses} with ready responses.")
            if has_model and has_responses and not self.has_pairs:
                raise ValueError(f"Give one of --{model} and --{responses}: the first would not be used.")
        if data.prompts is None and data.responses is None and data.ref_responses is None and not self.has_pairs:
            raise ValueError("the win rate needs prompts: give --prompts, or --dataset_name to take those of pairs.")

    @property
    def has_duel(self) -> bool:
        """Whether policy and reference answer prompts and a reward model judges."""
        return self.reward.reward_model_name_or_path is not None

    @property
    def has_pairs(self) -> bool:
        """Whether log-probabilities of preference pairs are taken."""
        return self.data.dataset_name is not None


def run(job: Job) -> None:
    """Check everything, make what is missing, write, and print the table."""
    from hf_moe_cpt.evaluation.preference import (
        Evaluation,
        Stopped,
        accuracy_measures,
        judge,
        table_rows,
        win_measures,
        write_results,
    )
    from hf_moe_cpt.machine import machine_facts
    from hf_moe_cpt.reports.tables import text_table

    work = Evaluation(job)
    work.folder.claim()
    output = job.output
    measures: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    try:
        if job.has_duel:
            judged = judge(*work.duel(), output.tie_margin)
            if not judged:
                raise ValueError("no prompt is short enough for both models: give shorter ones or fewer new tokens.")
            measures |= win_measures(judged, output.confidence)
            lines["judged"] = judged
            for side, key in (("policy", "response"), ("reference", "ref_response")):
                lines[f"responses_{side}"] = [{"prompt": row["prompt"], "response": row[key]} for row in judged]
        if job.has_pairs:
            scored, ref_scored = work.pair_scores()
            measures |= accuracy_measures(scored, ref_scored, output.confidence)
            lines["pairs"] = scored
            if ref_scored is not None:
                lines["pairs_reference"] = ref_scored
    except Stopped:
        print(f"{work.folder.root} holds {output.stop_after}; start again without --stop_after to go on.")
        return
    facts = {"settings": work.folder.settings, "machine": machine_facts(work.device, output.commit)}
    write_results(work.folder.root, measures, work.notes, facts, lines)
    for note in work.notes:
        print(note)
    print(f"files: {output.output_dir}\n\n{text_table(table_rows(measures, output.confidence))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, respond, judge, score, write."""
    run(Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt eval-preference", description=__doc__)))


if __name__ == "__main__":
    run_script(main)
