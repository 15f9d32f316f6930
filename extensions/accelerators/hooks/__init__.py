"""The hooks that accelerators add: the arena of experts on a GPU, and the operators that torch.compile traces."""
