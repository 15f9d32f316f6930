"""What tests of retrieval share."""

from angles import cosine as cosine
from angles import plane as plane
from angles import score as score
