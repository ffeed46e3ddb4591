"""A plan carried back to a graph, and a model that trains by it."""
