"""The merge methods that weigh by data: one file, one method."""
