"""The embedder that a published router names: the base model's own states."""
