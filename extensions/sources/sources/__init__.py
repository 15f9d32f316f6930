"""Packed files of adapters, one file each: a source is recognised by its name, and unpacked while it is read."""
