"""The intake of adapters and mixtures: the checks before one is stored."""
