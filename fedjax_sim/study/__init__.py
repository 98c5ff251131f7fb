"""Studies: many runs that belong together, and how their settings compare."""
