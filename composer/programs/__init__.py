"""Programs: adapters one after the other, each asked by its own instruction."""
