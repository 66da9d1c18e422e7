"""Every method on one task, at a knob chosen in the same way for each: how near, how accurate, at what cost."""
