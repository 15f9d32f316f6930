"""Text from mixtures: calls of the model's own generate, streams, draws that are the same in any batch."""
