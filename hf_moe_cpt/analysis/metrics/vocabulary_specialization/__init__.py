"""The metric `vocabulary_specialization`: `hf_moe_cpt.analysis.routing_metrics` has its folder for `evaluate.load`."""
