"""What the trainers share: losses per source, expert loads, throughput, checkpoints, guards. Knows no method."""
