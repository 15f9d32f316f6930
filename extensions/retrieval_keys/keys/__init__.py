"""Further ways to tell from an adapter how well it fits a query, one a file."""
