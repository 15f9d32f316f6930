"""Retrieval keys, one a file: each scores how well an adapter fits a query."""
