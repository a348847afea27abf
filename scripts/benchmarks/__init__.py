"""Timings and memory of kernels, steps and trainers, beside what others use; one harness."""
