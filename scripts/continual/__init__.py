"""Jobs around a run of continual pre-training: before it, and between its checkpoints."""
