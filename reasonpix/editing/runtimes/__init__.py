"""Runtimes that compute the networks of an editing model."""
