"""Hostile input, each piece under a name."""
