"""Which adapters fit this input."""
