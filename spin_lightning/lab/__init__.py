"""A language whose law is known, and the game played on it: every distance to the data is computed, none estimated."""
