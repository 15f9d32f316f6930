"""The model as a mixture sees it: its layers, batches, answers and limits."""
