"""Fixtures of tests of token routers."""

from router_inputs import has_exact_gradients as has_exact_gradients
from router_inputs import random_pool as random_pool
from router_inputs import trained_router as trained_router
from router_inputs import x_BTI as x_BTI
