"""Datasets in and out: readers, writers, cards and the hub."""
