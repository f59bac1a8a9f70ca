"""A user's rows, from a file or the hub to token ids."""
