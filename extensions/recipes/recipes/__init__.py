"""Recipes beside those of the core, one file each: their experts, gates and sites."""
