"""Telling the user what of the model is recorded, and what is not."""

import logging
import sys
import warnings

from dynamics.errors import LeftOutWarning
from dynamics.runs.account import Account


def announce(account: Account) -> None:
    """Say in one line what is recorded; warn where more than 1 % is left out unasked.

    The line goes to the logger "probes" at level INFO, or to stderr where the process has set up
    no logging.
    """
    line = f"Recorder: records {account.line(names=3)}."
    logger = logging.getLogger("probes")
    if logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)
    if warning := account.warning():
        warnings.warn(
            f"{warning} Leave them out with select= if this is meant; recorder.account lists "
            "every one.",
            LeftOutWarning,
            stacklevel=3,
        )
