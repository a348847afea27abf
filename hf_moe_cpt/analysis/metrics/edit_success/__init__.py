"""The metric `edit_success`: `evaluate.load(hf_moe_cpt.analysis.editing.METRIC_FOLDER)`."""
