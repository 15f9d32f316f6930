"""Merge methods for what clients have trained apart, one file each."""
