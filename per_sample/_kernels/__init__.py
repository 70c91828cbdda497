"""Weight-gradient algorithms as pure tensor functions, and the choice among them by shape."""
