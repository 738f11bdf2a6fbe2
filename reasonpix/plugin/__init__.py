"""The plugin API: components, the values they exchange, hooks, and tools to test them."""
