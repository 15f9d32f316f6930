"""Whether a hub is whole, and what looks wrong about an adapter."""
