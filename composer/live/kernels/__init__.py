"""The naive live mixture and the fast paths that must equal it."""
