"""Conversion of pretrained transformers models: `door` opens, `table` knows architectures, `surgery` changes layers."""
