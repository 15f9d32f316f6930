"""Gates of trainable mixtures: from what a layer sees, or from what is known of a row, to the weights of its experts."""
