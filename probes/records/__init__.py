"""What a record holds, and how it gets to the store."""
