"""Which adapter counted for which token: figures, page, plot, cost."""
