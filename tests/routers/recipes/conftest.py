"""What tests of recipes share."""

from recipe_sites import adds_up as adds_up
from recipe_sites import seen_at as seen_at
from recipe_sites import terms_of as terms_of
