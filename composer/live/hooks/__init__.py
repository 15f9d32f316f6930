"""Hooks into live mixtures: a class for each, found by the registry, that may serve what the core's plain ways serve."""
