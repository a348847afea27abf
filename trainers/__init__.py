"""Trainers for any causal language model of transformers: one folder a method, `instruments/` for what they share."""
