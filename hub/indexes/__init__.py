"""Vector indexes, one file for each."""
