"""How one matrix is measured: its singular values, their error, and the noise floor."""
