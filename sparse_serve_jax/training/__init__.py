"""Training a small model that retrieves over long contexts: what to train, on what, and the loop."""
