"""The metric `preference_accuracy`: `evaluate.load(hf_moe_cpt.analysis.preference_accuracy.METRIC_FOLDER)`."""
