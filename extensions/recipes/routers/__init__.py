"""Routers over existing adapters with the gates of a recipe, one file each."""
