"""The forms in which the experts of a place enter its output; one file each."""
