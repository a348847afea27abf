"""The metric that `metric_folder("router_saturation")` of `hf_moe_cpt.metrics` names."""
