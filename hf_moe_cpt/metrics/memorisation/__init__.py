"""The metric `memorisation`: `evaluate.load(hf_moe_cpt.evaluation.text_metrics.METRIC_FOLDER)`."""
