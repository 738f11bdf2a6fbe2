"""The editing model: network, checkpoints and inference."""
