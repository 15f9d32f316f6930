"""Fixtures of tests of routers."""

from router_inputs import has_exact_gradients as has_exact_gradients
