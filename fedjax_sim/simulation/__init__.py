"""The simulator: planning, dispatch, checks before a run, costs."""
