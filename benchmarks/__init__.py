"""Measurements of loraweave beside its peers; `python -m benchmarks --help` lists them, RESULTS.md has what they found."""
