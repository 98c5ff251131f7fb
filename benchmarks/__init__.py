"""How fast it is: `python -m benchmarks.engine`, `... benchmarks.scaling`."""
