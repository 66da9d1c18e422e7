"""One file a family of base models."""
