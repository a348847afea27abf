"""The metric `vocabulary_specialization`: `hf_moe_cpt.metrics.base` has its folder for `evaluate.load`."""
