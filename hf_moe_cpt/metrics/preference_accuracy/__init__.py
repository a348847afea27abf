"""The metric `preference_accuracy`: `evaluate.load(hf_moe_cpt.evaluation.statistics.METRIC_FOLDER)`."""
