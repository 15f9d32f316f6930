"""Recipes of trainable mixtures: experts, gates and where they go; one file each."""
