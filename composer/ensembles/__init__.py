"""Mixtures combined in prediction space: each runs by itself, and their predictions are combined."""
