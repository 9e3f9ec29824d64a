"""What a run is, and what its matrices are called."""
