"""Experiments: runs as data, results as JSON, figures from results."""
