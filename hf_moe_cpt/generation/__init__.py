"""Answers sampled from a model and scored, and the preference pairs made of them."""
