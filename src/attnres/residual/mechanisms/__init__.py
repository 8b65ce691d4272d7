"""One residual mechanism a file, each known to the registry by name."""
