"""One file per vector index."""
