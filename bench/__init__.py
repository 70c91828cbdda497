"""Benchmarks: every method on every workload, answers checked before times. `python -m bench`."""
