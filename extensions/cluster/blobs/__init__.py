"""Stores of blobs by the scheme of their URL, `fsspec` for all others; one is made from (url, folder for copies)."""
