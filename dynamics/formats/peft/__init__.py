"""Adapters that PEFT wrote."""
