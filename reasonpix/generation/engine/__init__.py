"""Executors: shards through stages, in this process or on Ray."""
