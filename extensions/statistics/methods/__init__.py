"""The merge methods that weigh by data, one file each."""
