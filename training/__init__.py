"""Training: from captioned pictures to CLIP, autoencoder, prior and decoder, and their measure."""
