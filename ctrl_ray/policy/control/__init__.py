"""How a label reaches the denoiser."""
