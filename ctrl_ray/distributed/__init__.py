"""Ray Train workers, the DeepSpeed engine and its config, checkpoints. The only users of deepspeed."""

import logging


def _tells(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's is of use: which processes have a card is decided here (`worker_environment`)."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


logging.getLogger("DeepSpeed").addFilter(_tells)  # before anything imports it: it tells this when it is imported
