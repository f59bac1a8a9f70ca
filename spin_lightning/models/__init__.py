"""A model, from its name to the log-probs of its responses."""
