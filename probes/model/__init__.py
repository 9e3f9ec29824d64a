"""What is read of a live model."""
