"""One kind of layer a file: attention kinds and feed-forward kinds."""
