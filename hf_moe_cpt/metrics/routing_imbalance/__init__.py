"""The metric that `metric_folder("routing_imbalance")` of `hf_moe_cpt.metrics` names."""
