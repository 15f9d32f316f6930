"""Federated training: clients train adapters on rows of their own, and a server aggregates what they send."""
