"""The errors and warnings a user can cause or meet.

Every message says what went wrong, where, what was found and what to do, in one line.
The command line prints these without a traceback; anything else is a bug of ours.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class DynamicsError(ValueError):
    r"""A request or an input that cannot be served as given.

    >>> str(DynamicsError("a name with\na line break"))
    'a name with a line break'
    """

    def __init__(self, message: str):
        # Names that a file gives may hold anything, also what a terminal takes as a command.
        super().__init__("".join(each if each.isprintable() else " " for each in message))


class FormatError(DynamicsError):
    """A path holds nothing readable, or a file in it is damaged."""


class MissingError(DynamicsError):
    """A step, kind, matrix, metric or base model was asked for that is not there."""


class OutputExistsError(DynamicsError):
    """An output path exists and overwriting was not asked for."""


class RecordingHeldError(DynamicsError):
    """Another writer has the recording."""


class UnmeasuredWarning(UserWarning):
    """A matrix or a checkpoint could not be measured; the rest was.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", dy.UnmeasuredWarning)
        ...     ranks = dy.analyze("run.zarr", kinds=["weight"])
    """


class LeftOutWarning(UnmeasuredWarning):
    """A considerable part of a model is not measured, and the user did not choose so.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", dy.LeftOutWarning)  # rather stop than miss a part
        ...     ranks = dy.analyze("run.zarr", kinds=["weight"])
    """


class IntervalWarning(UserWarning):
    """Runs are compared whose updates or displacements are over different intervals.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", dy.IntervalWarning)  # rather stop than compare these
        ...     both = dy.compare({"full": "full/run.zarr", "relora": "relora/run.zarr"})
    """


class RandomReferenceWarning(UserWarning):
    """Intruders were counted against the first record, which may be a random start.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():  # the model was pretrained before its first record
        ...     warnings.simplefilter("ignore", dy.RandomReferenceWarning)
        ...     found = dy.intruders("run.zarr", k=2)
    """


def one_line(error: Exception) -> str:
    r"""An exception's text without line breaks and full stop, or its type where it has none.

    >>> one_line(ValueError("first\n  second."))
    'first second'
    """
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def near(name: str, known: Iterable[str]) -> str:
    """Text like " (did you mean 'x'?)" for the name that is most alike, "" where none is.

    >>> "No metric 'stable_rnak'" + near("stable_rnak", ["rank_bound", "stable_rank"])
    "No metric 'stable_rnak' (did you mean 'stable_rank'?)"
    >>> near("er", ["effective_rank"])
    ''
    """
    by_lower = {each.lower(): each for each in known}
    alike = get_close_matches(name.lower(), by_lower, 1, 0.7)
    return f" (did you mean {by_lower[alike[0]]!r}?)" if alike else ""


def require_extra(extra: str, missing: ImportError) -> DynamicsError:
    """The error for a feature whose optional dependency is not installed.

    >>> str(require_extra("relora", ImportError(name="peft")))
    "This needs the package 'peft': pip install 'learning-dynamics[relora]'."
    """
    return DynamicsError(
        f"This needs the package {missing.name!r}: pip install 'learning-dynamics[{extra}]'."
    )


def local_path(path: str | Path) -> Path:
    """The path of something that is written to a disk; a URL is refused.

    `Path` would turn s3://bucket/ranks.zarr into a folder "s3:" below the current one.

    >>> local_path("ranks.zarr").name
    'ranks.zarr'
    """
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path)):
        raise DynamicsError(
            f"{match[1]}://{match[2]} is a URL; results, figures and caches lie on a disk: give a "
            "path, and copy it from there."
        )
    return Path(path)
