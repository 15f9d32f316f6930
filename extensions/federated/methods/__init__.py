"""Merge methods for adapters that clients have trained separately, one file each."""
