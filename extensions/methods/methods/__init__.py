"""The merge methods of this extension, one file each."""
