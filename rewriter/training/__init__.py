"""Training a rewritten model: recovery, parameter groups, remapped optimizers."""
