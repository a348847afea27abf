"""LLM Surgery: unlearn, update and retain in one objective, each set with its own weight and a bound on forgetting."""
