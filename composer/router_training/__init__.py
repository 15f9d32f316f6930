"""The training of routers: rows with targets, steps on the router's parameters alone, and what is seen on the way."""
