"""Objectives of searches: losses of examples, one file each."""
