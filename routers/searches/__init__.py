"""Searches for the weights of a task: one file each, on one Solver."""
