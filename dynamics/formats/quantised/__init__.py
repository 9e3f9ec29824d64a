"""Quantised weights: codes and scales in a checkpoint, read as the numbers that they stand for."""
