"""The metric that `metric_folder("continuation_overlap")` of `hf_moe_cpt.metrics` names."""
