"""How the quickstart's mixtures of experts route held-out text: the comparison that `hf-moe-cpt analyze` makes.

The first checkpoint is the pre-trained model, the others are what became of it with and without replay. Traces go to
routing/traces/, the page with everything to routing/report.html; results.json keeps what the quickstart's own page
shows. Source: ours; the questions are those of paper 1 (arXiv 2503.05029).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from hf_moe_cpt.analysis.collect_routing import collect_routing
from hf_moe_cpt.analysis.imbalance_curve import imbalance_curve
from hf_moe_cpt.analysis.routing_report import write_routing_report
from hf_moe_cpt.analysis.trace_analysis import analyse_traces
from hf_moe_cpt.scripts.quickstart_data import QuickstartData
from hf_moe_cpt.scripts.quickstart_folder import QuickstartFolder
from hf_moe_cpt.scripts.quickstart_plan import MOE, Plan
from hf_moe_cpt.scripts.quickstart_results import RECOVERY_TOLERANCE


TRACED_TOKENS = 8192  # of each domain's held-out text, a few seconds for each model on two CPU cores


def compare_routing(
    plan: Plan, data: QuickstartData, folder: QuickstartFolder, records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trace the mixtures on both held-out domains, write the page, and return what results.json keeps of it.

    records: of finished stages, whose logs give MRI by training step.
    """
    texts = {data.old.name: data.old.held_out, data.new.name: data.new.held_out}
    traces = {}
    for stage in plan.stages:
        if stage.model != MOE:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder.model(stage.name), local_files_only=True).to(plan.device)
        traces[stage.name] = collect_routing(
            model,
            texts,
            folder.routing / "traces" / stage.name,
            name=stage.name,
            tokenizer=data.tokenizer,
            batch_size=2 * plan.scale.batch_size,
            max_length=plan.scale.max_length,
            tokens_per_domain=TRACED_TOKENS,
            progress=False,
        )
    analysis = analyse_traces(traces, tokenizer=data.tokenizer, training=_curves(plan, records), min_occurrences=5)
    write_routing_report(analysis, folder.routing, f"Routing before and after {data.new.name}")
    return {
        "metrics": {
            name: {text: m["mri"] for text, m in found.items()} for name, found in analysis["metrics"].items()
        },
        "saturation": analysis["saturation"],
        "vocabulary_specialization": analysis["vocabulary_specialization"],
    }


def _curves(plan: Plan, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """MRI by step of each continued mixture, behind that of pre-training."""
    curves = []
    for stage in plan.stages:
        if stage.model != MOE or stage.is_pretraining:
            continue
        steps: list[int] = []
        layers: list[list[float]] = []
        for name in (stage.starts_from, stage.name):
            entries = [entry for entry in records[name]["history"] if "mri/layer_00" in entry]
            begin = 0 if name == stage.starts_from else plan.scale.steps
            steps += [begin + entry["step"] for entry in entries]
            keys = sorted(key for key in entries[0] if key.startswith("mri/layer_"))
            layers = layers or [[] for _ in keys]
            for layer, key in zip(layers, keys, strict=True):
                layer += [entry[key] for entry in entries]
        shift, ideal = plan.scale.steps + 1, records[stage.name]["ideal_mri"]
        curve = imbalance_curve(stage.name, steps, layers, ideal=ideal, shift_step=shift, tolerance=RECOVERY_TOLERANCE)
        curves.append(curve)
    return curves
