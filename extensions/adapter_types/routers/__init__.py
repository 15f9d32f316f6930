"""Routers over the adapters of a type, one a file."""
