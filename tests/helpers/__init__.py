"""What tests of several rooms share: tolerances, fresh memory, processes, the source tree, tiny models and runs."""
