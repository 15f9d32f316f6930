"""The embedder of a published router: the base model's own hidden states."""
