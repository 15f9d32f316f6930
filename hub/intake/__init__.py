"""The intake of adapters: folders, archives, the model hub and whole trees, and the checks before one is stored."""
