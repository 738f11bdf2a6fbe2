"""Export to other runtimes, and serving."""
