"""Text on the way to a model: sources, tokens, batches."""
