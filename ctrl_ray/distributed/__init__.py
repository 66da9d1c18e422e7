"""The hot path: training workers under Ray Train, their batches, engine and checkpoints, and what the driver runs them with."""

import logging


def _tells(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's is of use: which processes have a card is decided here (`worker_environment`)."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


logging.getLogger("DeepSpeed").addFilter(_tells)  # before anything imports it: it tells this when it is imported
