"""The metric `routing_imbalance`: its folder is in `hf_moe_cpt.analysis.routing_metrics`, for `evaluate.load`."""
