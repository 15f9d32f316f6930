"""Further keys, one file each: ways to compute from an adapter how well it fits a query."""
