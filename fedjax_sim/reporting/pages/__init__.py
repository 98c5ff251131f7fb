"""Pages about runs: what their files say, in sections, as HTML."""
