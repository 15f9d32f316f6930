"""The way from a few examples to a composition: candidates, losses, ways, guard, and what is done with the result."""
