"""One file for each program that loads adapters: what it cannot hold, and how what it can is written."""
