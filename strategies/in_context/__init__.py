"""Retrieval in context: the nearest edit is told to the model before the prompt."""
