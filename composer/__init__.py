"""Putting weighted experts into the running model."""
