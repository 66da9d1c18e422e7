"""What a checkpoint's score says of it; imports nothing, for Ray Train's controller reads it too."""

UNSCORED = -1e6
"""Score of a checkpoint that was not evaluated: worse than any that was."""
