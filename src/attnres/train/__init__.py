"""Training: corpora, optimizers, checkpoints and the loop."""
