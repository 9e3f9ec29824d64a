"""The gradients of one optimizer step."""
