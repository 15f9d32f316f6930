"""Adapters trained on a frozen model, several in each step or one after the other."""
