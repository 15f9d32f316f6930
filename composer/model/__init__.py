"""Views of a model that mixtures need: its layers, batches, answers and limits."""
