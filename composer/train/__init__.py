"""Everything that learns on a frozen base: adapters, routers, experts."""
