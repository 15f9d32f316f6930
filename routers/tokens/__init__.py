"""Routers that weigh experts for every token or row, one a file, and their common base classes."""
