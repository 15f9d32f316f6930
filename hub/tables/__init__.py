"""The SQL of the catalogue: one file for each table, and `filtering` for queries across tables."""
