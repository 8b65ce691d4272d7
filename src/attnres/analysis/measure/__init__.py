"""Looking inside a model: weights, magnitudes, gradients, what a source is worth."""
