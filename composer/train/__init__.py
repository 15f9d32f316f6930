"""The parts that learn on a frozen base: adapters, routers, experts."""
