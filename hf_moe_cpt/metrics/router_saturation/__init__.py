"""The metric `router_saturation`: its folder is in `hf_moe_cpt.metrics.base`, for `evaluate.load`."""
