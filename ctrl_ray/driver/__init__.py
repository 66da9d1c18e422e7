"""A run's stages, on the driver."""
