"""Two shows: the game on a small real model, and on a known language, measured exactly."""
