"""The metric `retained_behaviour`: `evaluate.load(hf_moe_cpt.analysis.retained_behaviour.METRIC_FOLDER)`."""
