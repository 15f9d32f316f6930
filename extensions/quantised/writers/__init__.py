"""The writers that quantised bases bring."""
