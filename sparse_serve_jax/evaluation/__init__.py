"""What a model is evaluated on, and how its answers are scored."""
