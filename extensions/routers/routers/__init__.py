"""Routers and searches, one a file."""
