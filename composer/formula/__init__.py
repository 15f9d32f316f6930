"""Formulas: compositions of stored adapters as text."""
