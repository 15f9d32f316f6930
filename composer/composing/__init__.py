"""How compose() comes to a mixture: candidates, ways to choose among them, held-out figures, and the guard."""
