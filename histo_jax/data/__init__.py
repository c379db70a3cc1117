"""From raw files to batches of uint8; nothing here knows JAX."""
