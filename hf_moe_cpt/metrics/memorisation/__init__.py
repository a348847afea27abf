"""The metric that `metric_folder("memorisation")` of `hf_moe_cpt.metrics` names."""
