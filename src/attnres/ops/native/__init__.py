"""Depth attention in C, for CPUs."""
