"""Packed files in which adapters come: each is told by its name, and unpacked while it is read."""
