"""What the method is compared with: samplers of the same target that train nothing, and other ways to train."""
