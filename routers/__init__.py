"""Routers: what decides how much each expert counts."""
