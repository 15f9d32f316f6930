"""Export targets, one file for each program that loads adapters: the limits of the program, and its files."""
