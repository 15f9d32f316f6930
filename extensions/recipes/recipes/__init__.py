"""Recipes beside those of the core: their experts, gates and sites, one file each."""
