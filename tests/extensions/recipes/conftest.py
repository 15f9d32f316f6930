"""What tests of recipes, and of the router of one, share with those of the core."""

from gradients_of_weights import has_exact_gradients as has_exact_gradients
from recipe_sites import adds_up as adds_up
from recipe_sites import seen_at as seen_at
from recipe_sites import terms_of as terms_of
from router_inputs import random_pool as random_pool
from router_inputs import x_BTI as x_BTI
