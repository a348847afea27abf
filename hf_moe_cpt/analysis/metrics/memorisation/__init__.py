"""The metric `memorisation`: `evaluate.load(hf_moe_cpt.analysis.memorisation.METRIC_FOLDER)`."""
