"""A demo that needs no download: skills made by a program."""
