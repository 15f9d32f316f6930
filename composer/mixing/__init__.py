"""What an activation does to a layer: requested mixtures, their weights, and the kernels that are made of them."""
