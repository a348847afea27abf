"""The metric that `metric_folder("fluency")` of `hf_moe_cpt.metrics` names."""
