"""The SQL of the catalogue, a file for each table and for what is read of several."""
