"""Modules that every room may import: nothing here imports a room."""
