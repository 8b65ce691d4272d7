"""Measuring a model: tasks of lm-eval, and perplexity of a text."""
