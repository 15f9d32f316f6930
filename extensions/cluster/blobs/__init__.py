"""Stores of blobs, named by the scheme of their URL (`fsspec` for others) and made from (url, folder for local copies)."""
