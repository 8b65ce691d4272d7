"""Looking inside a trained model, and showing what was seen."""
