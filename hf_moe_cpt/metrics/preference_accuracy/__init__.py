"""The metric that `metric_folder("preference_accuracy")` of `hf_moe_cpt.metrics` names."""
