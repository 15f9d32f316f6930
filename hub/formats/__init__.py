"""Adapter formats, one file for each: it reads the format into factors, and may write it."""
