"""The metric `expert_coactivation`: its folder is in `hf_moe_cpt.analysis.routing_metrics`, for `evaluate.load`."""
