"""Continual pre-training: new text with replay of the old, under schedules that can be continued."""
