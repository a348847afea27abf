"""The metric `fluency`: `evaluate.load(hf_moe_cpt.analysis.continuation_overlap.FLUENCY_METRIC_FOLDER)`."""
