"""Reports, figures, tracking: what people look at after and during a run."""
