"""Find, identify, load and save checkpoints."""
