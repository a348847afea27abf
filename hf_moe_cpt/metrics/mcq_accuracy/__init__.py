"""The metric that `metric_folder("mcq_accuracy")` of `hf_moe_cpt.metrics` names."""
