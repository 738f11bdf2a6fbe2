"""Figures of the mini checkpoints on held-out scenes, each through the plugin that users run."""
