"""The recorder as a callback: one file per training framework."""
