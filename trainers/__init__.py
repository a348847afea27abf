"""Trainers for any causal language model of transformers: one folder a method, `common/` for what they share."""
