"""Routers, which decide the weight of each expert."""
