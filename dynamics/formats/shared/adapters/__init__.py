"""What adapters make of a model's weights: which method, on which layer, in which orientation."""
