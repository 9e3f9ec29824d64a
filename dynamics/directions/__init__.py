"""Where matrices point: subspaces of updates, adapters and gradients."""
