"""Which layers a live mixture cannot reach, or not row by row, and what has changed in the model since."""
