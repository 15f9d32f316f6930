"""Mixtures combined in prediction space: each runs by itself, and what they predict is put together."""
