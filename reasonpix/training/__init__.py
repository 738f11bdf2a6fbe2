"""Training of editing models."""
