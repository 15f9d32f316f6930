"""Mixtures written into the weights: the writing, the parameter that is written over, and the restoring."""
