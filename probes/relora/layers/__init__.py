"""Layers that a method has in the place of dense linear ones."""
