"""Ways of training one task after the other, one file each."""
