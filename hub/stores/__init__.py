"""The stores of a hub's rows and blobs: connections, locks, migrations, packing, and the protocols of stores elsewhere."""
