"""The losses that a search minimises on the examples of a task; a file is a kind of loss."""
