"""State, steps and checkpoints; nothing here knows where the patches come from."""
