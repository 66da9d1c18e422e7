"""Sampling with candidates: one image out of each group of K, drawn by the weights of their paths for the target."""
