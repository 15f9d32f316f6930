"""One file per adapter format: read it into factors, write it back."""
