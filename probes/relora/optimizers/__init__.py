"""The optimizers of the methods that train the full-rank model in another way than AdamW does."""
