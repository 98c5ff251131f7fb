"""The simulator: planning, dispatch, checks before a run, hypergradients."""
