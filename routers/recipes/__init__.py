"""Recipes of trainable mixtures: their experts, gates and sites, one file each."""
