"""The metric that `metric_folder("retained_behaviour")` of `hf_moe_cpt.metrics` names."""
