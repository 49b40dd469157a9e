"""splice against the reference, in one run on one machine: `python -m benchmarks` from the repository root."""
