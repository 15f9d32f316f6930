"""What mixtures come to on a few examples: losses of whole populations, with gradients, in few passes."""
