"""One file per merge method: factors in, factors out."""
