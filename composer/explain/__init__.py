"""The explanation of which adapter counted for which token: figures, page, plot, cost."""
