"""Differential privacy: mechanisms, accounting, audits, leakage.

Mechanisms are pure functions of the compiled round; accountants work on the
host. What needs `dp-accounting` or `jax-privacy` imports them when it is used.
"""
