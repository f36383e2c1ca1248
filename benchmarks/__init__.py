"""Paired benchmarks: one process, medians and ratios, JSON with a machine line. Run as `python -m benchmarks.NAME`."""
