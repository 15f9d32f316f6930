"""Losses of these recipes; each states its value at uniform use and at collapse."""
