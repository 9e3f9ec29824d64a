"""What is read from a live model, and from its optimizer."""
