"""A local page over a hub: look, search, mix with sliders, and see which adapter counts for which token."""
