"""What routers do: hooks that find them in any model, metrics, traces, comparison of checkpoints, a report."""
