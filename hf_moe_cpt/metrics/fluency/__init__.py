"""The metric `fluency`: `evaluate.load(hf_moe_cpt.evaluation.text_metrics.FLUENCY_METRIC_FOLDER)`."""
