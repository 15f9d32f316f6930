"""The hooks that accelerators bring: the arena of experts on a GPU, and what torch.compile traces."""
