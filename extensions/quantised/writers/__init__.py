"""The writers of fused mixtures for quantised bases."""
