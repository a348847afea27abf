"""The metric `routing_imbalance`: its folder is in `hf_moe_cpt.metrics.base`, for `evaluate.load`."""
