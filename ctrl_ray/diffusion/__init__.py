"""Pure step mathematics of the reverse process, in float32: means, deviations, KL, guidance, noise."""
