"""Built-in sources and filters."""
