"""Runs in a workdir: training loop, checkpoints, tracking, summary."""
