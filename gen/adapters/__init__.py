"""What is added to a loaded model. Each kind has a module, and a file of its own on disk."""
