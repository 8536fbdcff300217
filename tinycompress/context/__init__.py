"""Passes that stretch the context."""
