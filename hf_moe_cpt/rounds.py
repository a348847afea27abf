"""The rounds of `hf-moe-cpt iterate`: three commands after one another, again and again, in a folder that can go on.

A stage is finished when the last file that its command writes is there, so nothing is done twice, and what a killed
stage left is continued by that command's own means. Source: ours.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import UniqueKeys, json_object, parse_arguments
from hf_moe_cpt.cli import COMMANDS
from hf_moe_cpt.cli import main as run_command
from hf_moe_cpt.evaluation.resumable import ResumableFolder, read_json, write_json
from hf_moe_cpt.reports import text_table, write_csv
from hf_moe_cpt.trainers.common.checkpointing import last_whole_checkpoint
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import preset_settings


OF_THE_LOOP = {  # what each command is told here
    "rejection-sample": ("model_name_or_path", "output_dir", "seed", "push_to_hub", "part", "stop_after"),
    "rainbowpo": (
        "model_name_or_path",
        "dataset_name",
        "output_dir",
        "resume_from_checkpoint",
        "push_to_hub",
        "dry_run",
    ),
    "eval-preference": ("model_name_or_path", "ref_model_name_or_path", "output_dir", "seed", "stop_after"),
}
MEASURES = {  # of an evaluation, by their columns in the report
    "reward": "mean reward of policy",
    "win_rate": "win rate",
    "characters": "mean characters of policy",
    "divergence": "divergence from reference (nats)",
}


@dataclass
class IterateArguments:
    """The rounds."""

    model_name_or_path: str = HfArg(help="The first policy, from which divergence is measured.")
    output_dir: str = HfArg(help="A new folder, or one in which this very run was interrupted.")
    sample: str = HfArg(help="Options of rejection-sample, as a JSON object or a YAML file.")
    train: str = HfArg(help="Options of rainbowpo, likewise.")
    evaluate: str = HfArg(help="Options of eval-preference, likewise; who scores is that of --sample if not given.")
    rounds: int = HfArg(default=3, metadata={"range": "[1, 1000]"}, help="How often.")
    prompts_per_round: int | None = HfArg(
        default=None,
        metadata={"range": "[1, inf)"},
        help="Each round takes the next so many prompts of the split; unset: all of them in every round.",
    )
    seed: int = HfArg(default=0, help="Of the first round's responses; each round has the next.")
    launcher: str | None = HfArg(
        default=None, help="Starts the training in processes, such as 'accelerate launch -m hf_moe_cpt'."
    )


Options = dict[str, Any]


def read_options(option: str, text: str, command: str) -> Options:
    """What is told to a command. Raises ValueError for what is no object, or what the loop itself tells."""
    if not isinstance(text, str):
        raise ValueError(f"{option} {text!r} is neither a JSON object nor a YAML file: name the command's options.")
    if text.lstrip().startswith("{"):
        options = json_object(option, text)
    else:
        try:
            options = yaml.load(Path(text).read_text(encoding="utf-8"), UniqueKeys)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{option} {text!r} is neither a JSON object nor a YAML file: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"{option} {text!r} must hold options by their names.")
    for name in OF_THE_LOOP[command]:
        if name in options:
            raise ValueError(f"{option}: {name} is what the loop decides: leave it out.")
    return options


def words_of(options: Options) -> list[str]:
    """The command line of options; None leaves one out."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


class Rounds:
    """The stages of all rounds. Raises ValueError for what a stage would refuse to parse, before any compute."""

    def __init__(self, args: IterateArguments) -> None:
        self.args, self.root = args, Path(args.output_dir)
        self.sample = read_options("--sample", args.sample, "rejection-sample")
        self.train = read_options("--train", args.train, "rainbowpo")
        judge = {name: value for name, value in self.sample.items() if name.startswith("reward_")}
        drawn = {"temperature": 1.0, "top_p": 1.0, "divergence": True}
        names = ("max_new_tokens", "batch_size", "device", "dtype", "trust_remote_code", "use_vllm", "vllm_options")
        drawn |= {name: self.sample[name] for name in names if name in self.sample}
        self.evaluate = drawn | judge | read_options("--evaluate", args.evaluate, "eval-preference")
        settings = {name: getattr(args, name) for name in ("model_name_or_path", "prompts_per_round", "seed")}
        parts = {"sample": self.sample, "train": self.train, "evaluate": self.evaluate}
        self.folder = ResumableFolder(self.root, "iterate.json", settings | parts)
        for command, options in (self.sampled(1), self.trained(1), self.evaluated(1)):
            defaults = preset_settings(options["preset"]) if options.get("preset") else {}
            if options.get("simpo_gamma") is not None:
                defaults.pop("home_advantage", None)
            module, program = importlib.import_module(COMMANDS[command].module), f"hf-moe-cpt {command}"
            parsed = parse_arguments(
                module.ARGUMENTS, words_of(options), program=program, description="", defaults=defaults
            )
            if any(getattr(part, "use_peft", False) for part in parsed):
                raise ValueError("--train: use_peft leaves an adapter, and the next round starts from a whole model.")
            if hasattr(module, "Job"):
                module.Job(*parsed)

    def place(self, number: int, what: str) -> Path:
        """Where a part of a round lies."""
        return self.root / f"round-{number}" / what

    def policy(self, number: int) -> str:
        """The policy that a round ends with; of round 0 the first one."""
        return str(self.place(number, "policy")) if number else self.args.model_name_or_path

    def sampled(self, number: int) -> tuple[str, Options]:
        """The command that makes a round's pairs, with its options."""
        told: Options = {"model_name_or_path": self.policy(number - 1), "seed": self.args.seed + number - 1}
        if (count := self.args.prompts_per_round) is not None:
            split = self.sample.get("dataset_split", "train")
            told["dataset_split"] = f"{split}[{(number - 1) * count}:{number * count}]"
        return "rejection-sample", self.sample | told | {"output_dir": str(self.place(number, "pairs"))}

    def trained(self, number: int) -> tuple[str, Options]:
        """The command that trains a round's policy, with its options."""
        told = {"model_name_or_path": self.policy(number - 1), "dataset_name": str(self.place(number, "pairs/data"))}
        told |= {"output_dir": self.policy(number), "resume_from_checkpoint": "auto"}
        return "rainbowpo", self.train | told

    def evaluated(self, number: int) -> tuple[str, Options]:
        """The command that examines a round's policy, with its options."""
        told = {"model_name_or_path": self.policy(number), "ref_model_name_or_path": self.args.model_name_or_path}
        told |= {"seed": self.args.seed, "output_dir": str(self.place(number, "evaluation"))}
        return "eval-preference", self.evaluate | told

    def run(self, number: int) -> None:
        """The stages of a round that are not finished."""
        if not self.place(number, "pairs/summary.json").is_file():
            _carry_out(*self.sampled(number))
        policy = self.place(number, "policy")
        if not (policy / "trainer_state.json").is_file():  # the last that a training writes
            if last_whole_checkpoint(policy) is None:  # what a killed training left that none can go on from
                shutil.rmtree(policy, ignore_errors=True)
            _carry_out(*self.trained(number), self.args.launcher)
        if not self.place(number, "evaluation/summary.json").is_file():
            _carry_out(*self.evaluated(number))

    def report(self) -> list[Options]:
        """A row for each finished round."""
        rows = []
        for number in range(1, self.args.rounds + 1):
            if not self.place(number, "evaluation/summary.json").is_file():
                break
            pairs = read_json(self.place(number, "pairs/summary.json"))
            measures = read_json(self.place(number, "evaluation/summary.json"))["measures"]
            row: Options = {"round": number, "pairs": pairs["pairs"], "sampled_reward": pairs["mean_score"]}
            for column, name in MEASURES.items():
                found = measures.get(name) or {}
                row |= {
                    column: found.get("value"),
                    f"{column}_low": found.get("low"),
                    f"{column}_high": found.get("high"),
                }
            rows.append(row)
        return rows


def _carry_out(command: str, options: Options, launcher: str | None = None) -> None:
    """Run a command, in this process or by a launcher. Ends the process with its code if it fails."""
    words = [command, *words_of(options)]
    code = run_command(words) if launcher is None else subprocess.run([*shlex.split(launcher), *words]).returncode
    if code:
        sys.exit(code)


def shown(rows: Sequence[Options]) -> str:
    """The report as text; the first policy's reward is what the first round sampled."""
    table = []
    for row in rows:
        line = {
            "round": str(row["round"]),
            "pairs": str(row["pairs"]),
            "sampled reward": f"{row['sampled_reward']:.3f}",
        }
        for column in MEASURES:
            value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
            text = "" if value is None else f"{value:.3f}"
            line[column.replace("_", " ")] = text if low is None else f"{text} [{low:.3f}, {high:.3f}]"
        table.append(line)
    return text_table(table)


def run(args: IterateArguments) -> str:
    """Check, then run what is missing; the report is written after every round and returned."""
    if PartialState().num_processes > 1:
        raise ValueError("iterate is started as one process: give what starts several to --launcher.")
    rounds = Rounds(args)
    rounds.folder.claim()
    rows: list[Options] = []
    for number in range(1, args.rounds + 1):
        rounds.run(number)
        rows = rounds.report()
        write_json(rounds.root / "report.json", {"rounds": rows})
        write_csv(rounds.root / "report.csv", rows)
    return shown(rows)
