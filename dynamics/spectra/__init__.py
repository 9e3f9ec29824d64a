"""How one matrix is measured: singular values, their error, their noise."""
