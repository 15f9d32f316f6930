"""Examiners of adapters that are added: each may list anomalies in the record, or refuse the adapter."""
