"""What was done to a model, as values."""
