"""Turns off the progress bars of transformers for single files."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def no_file_progress() -> Iterator[None]:
    """Show no bar per file: they would break the bar of the Trainer, and fill logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
