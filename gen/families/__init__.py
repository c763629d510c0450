"""One module per family of checkpoints: what its networks are told, and what a request may ask of it."""
