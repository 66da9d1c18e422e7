"""Ray Train workers, the DeepSpeed engine and its config, checkpoints. The only users of deepspeed."""

import logging

from ctrl_ray.collector import collect_seldom_in_workers


def _tells(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's is of use: which processes have a card is decided here (`worker_environment`)."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


collect_seldom_in_workers()  # before torch and DeepSpeed are imported
logging.getLogger("DeepSpeed").addFilter(_tells)  # before anything imports it: it tells this when it is imported
