"""The embedder for searches of bare inputs by the index alone."""
