"""The retrieval of adapters that fit an input."""
