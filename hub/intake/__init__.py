"""How adapters come in: folders, archives, the model hub and whole trees, and what is checked before one is stored."""
