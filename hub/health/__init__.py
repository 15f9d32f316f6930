"""Checks: whether a hub is intact, whether an adapter looks anomalous, and who signed it."""
