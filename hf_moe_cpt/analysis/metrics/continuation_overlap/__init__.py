"""The metric `continuation_overlap`: `evaluate.load(hf_moe_cpt.analysis.continuation_overlap.METRIC_FOLDER)`."""
