"""The merging of adapters into one adapter; no model is needed."""
