"""reasonpix: datasets for image editing by instructions that need reasoning, and models on them."""

__version__ = "0.1.0"
