"""The stages of a surgery evaluation: check the inputs, load a model only if a part of it is missing, measure, store.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_world import SETS
from hf_moe_cpt.extras import require
from hf_moe_cpt.scripts.benchmark_tools import choose_device, release_memory
from hf_moe_cpt.scripts.eval_surgery_folder import SurgeryEvalFolder, checksum_of_files
from hf_moe_cpt.scripts.eval_surgery_measure import Raw, evaluate_model
from hf_moe_cpt.scripts.eval_surgery_sets import EvalSettings, read_own_bench, sets_of
from hf_moe_cpt.scripts.rejection_sample_models import LoadOptions, load_policy, load_tokenizer


if TYPE_CHECKING:
    from hf_moe_cpt.scripts.eval_surgery import BenchArguments, Job


class SurgeryEvaluation:
    """The checked inputs of a job. Raises ValueError before any weight is read."""

    def __init__(self, job: Job) -> None:
        self.job = job
        choose_device(job.models.device)  # refuses one that is not there
        self.state = PartialState(cpu=job.models.device == "cpu")
        self.device = choose_device(job.models.device)
        self.settings = EvalSettings(**job.settings(), show_progress=self.state.is_main_process)
        self.options = LoadOptions(
            dtype=job.models.dtype,
            attn_implementation=job.models.attn_implementation,
            trust_remote_code=job.models.trust_remote_code,
            device=job.models.device,
        )
        self.bench = load_bench(job.bench)
        if not sets_of(self.bench, self.settings):
            raise ValueError(
                f"the bench holds nothing of the sets {', '.join(self.settings.sets or SETS)}: name others."
            )
        self.tokenizer = load_tokenizer(job.models.tokenizer or next(iter(job.models.given.values())), self.options)
        self.folder = SurgeryEvalFolder(job.output.output_dir, self._identity())

    def measurements(self) -> dict[str, Raw]:
        """Raw measurements of each model by side, from disk where they are there."""
        self.folder.check()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.claim()
        self.state.wait_for_everyone()
        missing = {side: self._missing_parts(side) for side in self.job.models.given}
        self.state.wait_for_everyone()  # nobody writes before everybody has looked
        for side, parts in missing.items():
            if parts:
                self._measure(side, parts)
        self.state.wait_for_everyone()
        return {
            side: {part: found for part in self.settings.parts if (found := self.folder.read(side, part)) is not None}
            for side in self.job.models.given
        }

    def _missing_parts(self, side: str) -> list[str]:
        has_reference = side != "before" and "before" in self.job.models.given
        return [
            part
            for part in self.settings.parts
            if self.folder.read(side, part) is None and (part != "divergence" or has_reference)
        ]

    def _measure(self, side: str, parts: list[str]) -> None:
        model = self._load(side)
        for part in parts:
            reference = self._load("before") if part == "divergence" else None
            settings = EvalSettings(**{**vars(self.settings), "parts": (part,)})
            found = evaluate_model(model, self.tokenizer, self.bench, settings, reference)
            if self.state.is_main_process:
                self.folder.write(side, part, found[part])
            if reference is not None:
                del reference
                release_memory(self.device)
        del model
        release_memory(self.device)

    def _load(self, side: str) -> PreTrainedModel:
        return load_whole(self.job.models.given[side], self.options)

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the measurements, up to rounding: neither batch size nor device."""
        given, bench = self.job.models.given, self.job.bench
        identity: dict[str, Any] = {f"{side}_files": checksum_of_files(name) for side, name in given.items()}
        identity |= {
            f"{side}_base_files": checksum_of_files(base_of_adapter(name))
            for side, name in given.items()
            if is_adapter(name)
        }
        identity |= {side: name for side, name in given.items()}
        identity |= {name: getattr(bench, name) for name in ("bench", "num_subjects", "bench_seed", "documents")}
        identity["bench_content"] = checksum_of_bench(self.bench)
        undecisive = ("batch_size", "show_progress", "parts")
        settings = {name: value for name, value in vars(self.settings).items() if name not in undecisive}
        tokenizer = self.job.models.tokenizer
        identity |= {"tokenizer": tokenizer, "tokenizer_files": tokenizer and checksum_of_files(tokenizer)}
        return identity | settings | {"dtype": self.job.models.dtype}


def load_whole(name: str, options: LoadOptions) -> PreTrainedModel:
    """A causal LM on its device; the folder of an adapter is merged into its base, as it would be for use.

    Side by side with its base an adapter would be rounded by itself, and relearning would leave it as it is.
    """
    if not is_adapter(name):
        return load_policy(name, options)
    peft = require("peft", needed_by=f"the adapter {name!r}")
    base = load_policy(base_of_adapter(name), options)
    return peft.PeftModel.from_pretrained(base, name).merge_and_unload().eval()


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file()


def base_of_adapter(name: str) -> str:
    """The model that the adapter in a folder belongs to."""
    return json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def checksum_of_bench(bench: SurgeryBench) -> str:
    """Of all documents and questions, so that an edited file is another bench."""
    digest = hashlib.blake2b(digest_size=8)
    for rows in (*bench.documents.values(), *bench.questions.values()):
        digest.update(json.dumps(rows.to_list(), sort_keys=True).encode())
    return digest.hexdigest()


def load_bench(arguments: BenchArguments) -> SurgeryBench:
    """The bench that the arguments name, generated if none is."""
    if arguments.bench is not None:
        return SurgeryBench.load(arguments.bench)
    if arguments.documents is not None:
        return read_own_bench(arguments.documents, arguments.questions)
    return SurgeryBench.generate(arguments.bench_seed, arguments.num_subjects)
