"""Users' files: text in any Unicode encoding, folders, tars, YAML; and what readers ignore."""
