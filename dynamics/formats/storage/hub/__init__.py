"""Model repositories on the Hugging Face hub: a tree of files, read by byte ranges."""
