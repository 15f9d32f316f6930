"""How much each expert counts."""
