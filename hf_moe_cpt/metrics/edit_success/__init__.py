"""The metric that `metric_folder("edit_success")` of `hf_moe_cpt.metrics` names."""
