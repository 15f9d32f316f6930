"""Programs that load adapters, one file for each: it refuses what they cannot compute, and writes the rest."""
