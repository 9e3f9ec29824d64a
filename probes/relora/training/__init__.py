"""One training of the reference experiment."""
