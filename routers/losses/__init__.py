"""Losses that keep experts in use, apart, or with their own domain; each says its value at uniform use and at collapse."""
