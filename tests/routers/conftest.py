"""What tests of routers share."""

from gradients_of_weights import has_exact_gradients as has_exact_gradients
