"""Live metrics: what a tracker shows while the model trains."""
