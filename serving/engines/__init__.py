"""Formulas as model names of other engines: each formula becomes a folder that they load as a LoRA adapter."""
