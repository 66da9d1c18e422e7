"""Rewards: log p(y|x,c) and its gradient with respect to clean latents, in this process or in a pool of Ray actors."""
