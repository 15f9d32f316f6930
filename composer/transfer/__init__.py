"""Adapters in another base: carried layer by layer, taught by the old answers, and how much of them arrives."""
