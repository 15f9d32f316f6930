"""Checks: whether a hub is intact, and whether an adapter looks anomalous."""
