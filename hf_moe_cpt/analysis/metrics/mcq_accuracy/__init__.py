"""The metric `mcq_accuracy`: `evaluate.load(hf_moe_cpt.analysis.multiple_choice.METRIC_FOLDER)`."""
