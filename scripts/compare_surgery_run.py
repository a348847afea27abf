"""One run of the comparison: a model is trained or operated on, then examined. Runs in worker processes.

What is measured is what `hf-moe-cpt surgery-eval` measures, as far as the comparison needs it. Source: ours.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.scripts.benchmark_tools import GIBIBYTE, Attempt, release_memory
from hf_moe_cpt.scripts.compare_preference_run import quiet_libraries
from hf_moe_cpt.scripts.compare_surgery_measures import curve_of, measures_of, validation_score
from hf_moe_cpt.scripts.compare_surgery_models import Material, make_material, train_model
from hf_moe_cpt.scripts.compare_surgery_plan import BEFORE, METHODS, Comparison, Run
from hf_moe_cpt.scripts.eval_surgery_measure import evaluate_model
from hf_moe_cpt.scripts.eval_surgery_robustness import relearn
from hf_moe_cpt.scripts.eval_surgery_scoring import score_tokens
from hf_moe_cpt.scripts.eval_surgery_sets import EvalSettings, questions_of, read_documents, room_of
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


KINDS = ("mcq", "paraphrase")
SURGERY_SETS = ("unlearn", "update", "retain", "obsolete", "neighbour", "unseen")
EVAL_BATCH_SIZE = 32


class Workshop:
    """Trains, operates on and examines the models of one comparison; models before are kept under `root`."""

    def __init__(self, comparison: Comparison, root: Path) -> None:
        self.comparison, self.root = comparison, root
        self.device = torch.device(comparison.device)
        self._materials: dict[int, Material] = {}

    def material(self, seed: int) -> Material:
        """The world of a seed and its tokenizer, made once."""
        if seed not in self._materials:
            self._materials[seed] = make_material(self.comparison.scale, seed, self.root / "corpus")
        return self._materials[seed]

    def carry_out(self, run: Run) -> dict[str, Any]:
        """The record of a run: measures by name, settings, curve of relearning, seconds, and peak memory on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        model, training = self._operated(run) if run.method in METHODS else (self._trained(run), {})
        trained = time.perf_counter()
        record = {"method": run.method, "architecture": run.architecture, "seed": run.seed, "split": run.split}
        record |= {"learning_rate": run.learning_rate, "strength": run.strength, "training": training}
        if self.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIBIBYTE
        record |= self.examine(model, run)
        record["seconds"] = {"training": trained - started, "examination": time.perf_counter() - trained}
        del model
        release_memory(self.device)
        return record

    def _trained(self, run: Run) -> PreTrainedModel:
        model = train_model(self.comparison, run, self.material(run.seed))
        if run.method == BEFORE:
            partial, folder = self.root / "models" / f".{run.cell}.partial", self.root / "models" / run.cell
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        return model

    def before(self, run: Run) -> PreTrainedModel:
        """The model before of the run's cell, in float32."""
        folder = self.root / "models" / run.cell
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.to(self.device).eval()

    def _operated(self, run: Run) -> tuple[PreTrainedModel, dict[str, Any]]:
        material = self.material(run.seed)
        settings = self.comparison.surgery_settings(run)
        rows = dict(material.bench.documents) | {"retain": material.retained()}
        with tempfile.TemporaryDirectory() as folder:
            trainer = SurgeryTrainer(
                self.before(run),
                args=_arguments(settings, folder, self.device),
                **{f"{name}_dataset": rows[name] for name in SURGERY_SETS},
                processing_class=material.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        facts = {"settings": settings, "steps": trainer.state.global_step, "log": trainer.state.log_history}
        facts["forget_target"] = trainer.forget_target
        return trainer.model.eval(), facts

    def examine(self, model: PreTrainedModel, run: Run) -> dict[str, Any]:
        """`measures` of the run's split and, of the test split, `relearn`; of the validation split, `score`."""
        scale, material = self.comparison.scale, self.material(run.seed)
        settings = EvalSettings(
            split=run.split,
            parts=("questions", "texts", "divergence") if run.split == "test" else ("questions",),
            kinds=KINDS if run.split == "test" else KINDS[:1],
            max_questions=scale.max_questions,
            max_documents=scale.max_documents,
            batch_size=EVAL_BATCH_SIZE,
            max_length=scale.max_length,
            relearn_steps=scale.relearn_steps,
            relearn_every=scale.relearn_every,
            relearn_lr=scale.relearn_rate,
            seed=run.seed,
        )
        reference = model if run.method == BEFORE else self.before(run)
        raw = evaluate_model(model, material.tokenizer, material.bench, settings, reference)
        measures = measures_of(raw)
        if run.split != "test":
            return {"measures": measures, "score": validation_score(measures)}
        if material.held_out is not None:
            measures["ce/real"] = self._loss_of(model, material, settings)
        if run.method == BEFORE:
            return {"measures": measures}
        bench = _only_unlearn(material.bench)
        asked = questions_of(bench, "unlearn", material.tokenizer, model, settings)
        curves = relearn(model, material.tokenizer, bench, asked, settings)
        return {"measures": measures, "relearn": curve_of(curves["own"])}

    def _loss_of(self, model: PreTrainedModel, material: Material, settings: EvalSettings) -> float:
        """Mean loss of held-out real text, in nats per token."""
        rows = [{"text": text, "prefix": ""} for text in material.held_out["text"][: settings.max_documents]]
        documents = read_documents(rows, material.tokenizer, room_of(model, settings))
        scores = score_tokens(model, [document.tokens for document in documents], EVAL_BATCH_SIZE)
        return -sum(float(score.logp.sum()) for score in scores) / sum(len(score.logp) for score in scores)


def _only_unlearn(bench: SurgeryBench) -> SurgeryBench:
    """The bench without the documents of other sets, which the relearning attack would train on as well."""
    documents = {name: rows if name == "unlearn" else rows.select([]) for name, rows in bench.documents.items()}
    return SurgeryBench(datasets.DatasetDict(documents), bench.questions, bench.version)


def _arguments(settings: dict[str, Any], folder: str, device: torch.device) -> SurgeryConfig:
    """Training in single precision on a CPU, in bfloat16 with single-precision weights on a GPU."""
    on_gpu = device.type == "cuda"
    return SurgeryConfig(
        **settings,
        output_dir=folder,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        log_term_gradients=False,
        report_to="none",
        disable_tqdm=True,
    )


_workshop: Workshop | None = None


def open_workshop(comparison: Comparison, root: Path) -> None:
    """Make this process a worker: one thread, no bars of libraries, and the workshop for `carry_out_here`."""
    global _workshop
    torch.set_num_threads(1)
    quiet_libraries()
    _workshop = Workshop(comparison, root)


def carry_out_here(run: Run) -> tuple[Run, dict[str, Any]]:
    """The run's record from this process's workshop; of a run that failed, {"error": one line}."""
    with Attempt() as attempt:
        return run, _workshop.carry_out(run)
    return run, {"error": attempt.reason}
