"""Losses of these recipes, one file each, with their values at uniform use of experts and at collapse."""
