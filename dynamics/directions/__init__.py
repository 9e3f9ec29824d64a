"""Where matrices point: the subspaces of updates, adapters and gradients."""
