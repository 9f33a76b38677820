"""Keeps libraries from talking over the progress display. Actors' output goes to Ray's log files anyway."""

import logging
import os
import warnings


def libraries() -> None:
    """Call before importing transformers or deepspeed in the driver."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
