"""Studies: many runs as rows of a few compiled programs."""
