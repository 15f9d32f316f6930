"""Formats of adapters that few hubs hold, one file for each."""
