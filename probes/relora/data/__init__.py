"""What the reference experiment trains on."""
