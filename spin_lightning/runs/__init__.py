"""A run's folder outlives its process: files, checkpoints, settings, signals."""
