"""The metric `router_saturation`: its folder is in `hf_moe_cpt.analysis.routing_metrics`, for `evaluate.load`."""
