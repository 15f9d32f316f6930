"""Examiners of adapters that a hub is asked to add: each may record anomalies, or refuse the adapter."""
