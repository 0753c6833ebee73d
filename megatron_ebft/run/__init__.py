"""A training run: flags, construction, the loop, saves, stopping and logging."""
