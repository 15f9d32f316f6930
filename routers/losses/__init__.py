"""Losses that balance the use of experts or separate them; each docstring gives the value at uniform use and at collapse."""
