"""The hook for diffusers' pipelines: a mixture for each call of their parts."""
