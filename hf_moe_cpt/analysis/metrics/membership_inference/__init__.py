"""The metric `membership_inference`: `evaluate.load(hf_moe_cpt.analysis.membership.METRIC_FOLDER)`."""
