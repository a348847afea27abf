"""The metric `expert_coactivation`: its folder is in `hf_moe_cpt.metrics.base`, for `evaluate.load`."""
