"""One file per way to tell from an adapter how well it fits a query."""
