"""The metric that `metric_folder("expert_coactivation")` of `hf_moe_cpt.metrics` names."""
