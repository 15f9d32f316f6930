"""Recipes: which experts a trainable mixture has in which layers, how they begin, what weighs them, with which losses."""
