"""The networks: transformer, VAE, text encoder."""
