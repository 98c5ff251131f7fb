"""Workdirs in buckets: copied there, locked there, fetched from there."""
