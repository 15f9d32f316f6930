"""Searches for the weights of a task, one a file, on one base class `Solver`."""
