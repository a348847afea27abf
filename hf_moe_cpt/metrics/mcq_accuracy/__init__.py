"""The metric `mcq_accuracy`: `evaluate.load(hf_moe_cpt.evaluation.text_metrics.METRIC_FOLDER)`."""
