"""Routers over the adapters of one type, one file each."""
