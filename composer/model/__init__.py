"""What a model is to a mixture: its layers, batches, answers and limits."""
