"""Ray Train workers, the DeepSpeed engine and its config, checkpoints, preflight. The only users of deepspeed."""
