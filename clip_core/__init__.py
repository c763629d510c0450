"""CLIP: its towers behind one face, its loss, its tokenizer, its scores. It knows nothing of diffusion."""
