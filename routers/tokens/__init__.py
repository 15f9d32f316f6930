"""Routers that weigh experts for every token or row, one a file, and what they share."""
