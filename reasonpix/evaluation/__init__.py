"""Metrics, benchmarks and comparisons of editing methods."""
