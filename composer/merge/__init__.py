"""Adapters in, one adapter out; no model needed."""
