"""Embedders of text, one file for each."""
