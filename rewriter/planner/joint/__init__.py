"""The joint forward and backward graph in numbers."""
