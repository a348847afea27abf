"""Metrics for `evaluate.load`: one folder each, with a script that carries the folder's name and a card."""
