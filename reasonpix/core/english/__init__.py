"""English grammar on plain strings, without a parser: nouns, noun phrases, edited captions."""
