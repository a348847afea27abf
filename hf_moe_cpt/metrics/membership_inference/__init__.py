"""The metric that `metric_folder("membership_inference")` of `hf_moe_cpt.metrics` names."""
