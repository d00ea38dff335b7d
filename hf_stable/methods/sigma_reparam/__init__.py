"""sigmaReparam: every weight used as gamma / sigma(W) * W."""
