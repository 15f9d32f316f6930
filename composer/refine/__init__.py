"""What can be done with a composition once its weights are chosen: fewer adapters, lower rank, a few steps of training."""
