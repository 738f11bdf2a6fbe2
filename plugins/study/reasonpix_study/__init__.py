"""The user study: `reasonpix study`, as a package of its own."""
