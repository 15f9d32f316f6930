"""Trainable mixtures of LoRA experts on a base model: sites, gates, the running call, saving and exchange."""
