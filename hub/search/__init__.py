"""Search of a hub: by a text, by vectors, by another adapter."""
