"""The stores of a hub's rows and blobs: SQLite and a folder on this machine, PostgreSQL and fsspec's stores elsewhere."""
