"""Routers with the gates of a recipe, over adapters that are there; one a file."""
