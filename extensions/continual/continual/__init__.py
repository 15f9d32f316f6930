"""The ways to train one task after the other, one file each."""
