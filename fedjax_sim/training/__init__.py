"""Parts of algorithms: local training, optimizers, schedules, wrappers."""
