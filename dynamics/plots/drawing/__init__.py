"""What the figures have in common: values, the time axis, styles, labels, captions."""
