"""Which format the checkpoints of a path are of.

A directory may fit several formats. Where they see the same checkpoints, the first one counts.
Where one sees a series of checkpoints below the directory and another a model in the directory
itself, the series is what is meant: Lightning's `checkpoints/` beside the final model.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.format import Format
from dynamics.formats.readings import Reading, may_be_others
from dynamics.formats.shared.found import CheckpointsFormat
from dynamics.formats.shared.series import is_one_checkpoint
from dynamics.formats.storage.files import entries


def detected_format(path: Path, formats: Sequence[Format]) -> Format:
    """The format of a path.

    Args:
        path: existing.
        formats: the known formats, in the order of detection.

    Raises:
        FormatError: none fits, or two fit equally.
    """
    is_file = not path.is_dir()
    listed = [] if is_file else entries(path)
    if not listed and not is_file:
        raise FormatError(f"{path} is empty.")
    candidates = [format for format in formats if format.single_files or not is_file]
    for position, format in enumerate(candidates):
        if format.recognises(path):
            is_series = isinstance(format, CheckpointsFormat) and not is_file
            return _series_format(path, candidates[position:]) if is_series else format
    for format in candidates:
        if format.resembles(path):
            return format
    recognised = "; ".join(format.description for format in candidates)
    if is_file:
        raise FormatError(
            f"{path} is a file, but not a checkpoint that can be read; give the directory of the "
            f"run, or one file of: {recognised}."
        )
    names = ", ".join(each.name + "/" * each.is_dir for each in listed[:8])
    names += f", ... ({len(listed)} entries)" * (len(listed) > 8)
    raise FormatError(
        f"{path} holds no run of a known format; found {names}. Known formats: {recognised}."
    )


def _series_format(path: Path, formats: Sequence[Format]) -> Format:
    """The format of the series at a path, where others than the first may fit, too.

    Raises:
        FormatError: two formats see other checkpoints of the same steps.
    """
    first = formats[0]
    assert isinstance(first, CheckpointsFormat)
    seen = Reading(first, path, first.places(path))
    is_part = seen.is_lone and is_one_checkpoint(path)
    is_whole = seen.number == len(seen.places) > 0
    if is_part or (is_whole and not any(may_be_others(seen))):
        return first
    readings = [seen] if seen.places else []
    for format in formats[1:]:
        if not isinstance(format, CheckpointsFormat):
            continue
        try:
            places = format.places(path) if format.recognises(path) else {}
        except FormatError:
            continue  # what it sees is ambiguous, and another format's is not
        found = Reading(format, path, places)
        if places and all(found.is_new_beside(each) for each in readings):
            readings.append(found)
    below = [each for each in readings if not each.is_lone]
    for one, other in combinations(below, 2):
        steps = [{*each.places.values()} for each in (one, other)]
        if steps[0] == steps[1] and None not in steps[0] and one.is_apart(other):
            raise FormatError(
                f"{path} can be read as {one.shown} (format {one.format.name!r}), or as "
                f"{other.shown} (format {other.format.name!r}); choose with format= (--format)."
            )
    best = max(below or readings, key=lambda each: each.number, default=None)
    return first if best is None else best.format
