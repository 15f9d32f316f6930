"""Mixtures that run beside the weights: plans, weights, residents, and the mixer that stands in for layers."""
