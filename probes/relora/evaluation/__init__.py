"""What trained models are evaluated on."""
