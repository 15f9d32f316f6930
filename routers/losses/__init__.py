"""Losses that keep experts in use, apart, or with their own domain; each states its value at uniform use and at collapse."""
