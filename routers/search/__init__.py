"""What every search for mixture weights shares: its space, its budget, its checkpoint and its result."""
