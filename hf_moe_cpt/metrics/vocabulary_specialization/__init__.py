"""The metric that `metric_folder("vocabulary_specialization")` of `hf_moe_cpt.metrics` names."""
