"""Programs that load adapters, one file each: it refuses adapters that the program cannot compute, and writes the others."""
