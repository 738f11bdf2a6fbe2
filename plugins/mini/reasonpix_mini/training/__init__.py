"""Scripts that train the mini checkpoints, one per model."""
