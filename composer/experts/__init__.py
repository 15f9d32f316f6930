"""Trainable mixtures of LoRA experts, live on a base model."""
