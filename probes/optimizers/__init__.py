"""When a step of the optimizers is over, and what optimizers say of it."""
