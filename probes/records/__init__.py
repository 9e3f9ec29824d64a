"""What a record holds, and how it reaches the store."""
