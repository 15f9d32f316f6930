"""Algebra on low-rank factors: pure functions."""
