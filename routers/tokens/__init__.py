"""Routers that weigh experts for every token or row: one file each, and what they share."""
