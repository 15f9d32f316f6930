"""Routers and searches, one file each."""
