"""Algorithms of the literature, written against the contract for tests."""
