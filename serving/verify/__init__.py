"""Which weights answered? What a server says beside the model at hand, and beside it with everything that may go wrong."""
