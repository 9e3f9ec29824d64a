"""Telling the user what of the model is recorded, and what is not."""

import logging
import sys
import warnings

from dynamics.runs.account import Account

_TOLERATED = 0.01  # of the numbers in matrices, left out by no choice of the user


class LeftOutWarning(UserWarning):
    """A recording lacks a considerable part of the model, and the user did not choose so."""


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
    lost = account.unchosen_share()
    if lost > _TOLERATED:
        of = "trainable numbers" if account.trained_share is not None else "numbers"
        warnings.warn(
            f"{100 * lost:.1f} % of the {of} in matrices and stacks of matrices are not recorded, "
            f"by no choice of yours: {account.line(names=3)}. Leave them out with select= if this "
            "is meant; recorder.account lists every one.",
            LeftOutWarning,
            stacklevel=3,
        )
