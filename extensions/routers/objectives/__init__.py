"""Losses of examples, one a file."""
