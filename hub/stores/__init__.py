"""Where a hub keeps its rows and its blobs: SQLite and a folder here, PostgreSQL and fsspec's stores elsewhere."""
