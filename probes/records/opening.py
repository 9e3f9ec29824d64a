"""Which store a recorder writes: the given one, or a numbered one beside it; and opening it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dynamics import schema
from dynamics.errors import (
    DynamicsError,
    FormatError,
    OutputExistsError,
    RecordingHeldError,
    one_line,
)
from dynamics.recordings import (
    Compression,
    Recording,
    RecordingWriter,
    StoreLike,
    absolute,
    can_be_numbered,
    existing_numbers,
    existing_recording,
    for_writing,
    name_of,
    numbered,
    recording_to_continue,
    store_name,
)
from probes.schedule import whole_number

REFUSE, OVERWRITE, NEXT = IF_EXISTS = ("refuse", "overwrite", "next")


class NewRecordingWarning(UserWarning):
    """A training is recorded to a store beside the given one, which another recording occupies."""


class Destination:
    """Where a recorder writes.

    Args:
        store: as the user gave it.
        if_exists: what a training from step 0 does where there is a recording: "refuse" it,
            "overwrite" it, or begin the "next" one beside it.
        resume_at: the step at which training resumes, or None.
        attrs: of a new recording.
        compression: of new arrays.
        take_over: see `RecordingWriter`.

    Attributes:
        store: the store that is written, once it is known; until then the given one.
        news: one line for the user, where this is not the given one; else "".

    Raises:
        DynamicsError: an argument that cannot be meant.
    """

    def __init__(
        self,
        store: StoreLike,
        if_exists: str,
        resume_at: int | None,
        attrs: Mapping[str, Any],
        compression: Compression,
        take_over: bool,
    ):
        if if_exists not in IF_EXISTS:
            raise DynamicsError(
                f"if_exists takes one of {', '.join(IF_EXISTS)}; found {if_exists!r}."
            )
        self._given = self.store = absolute(store)
        self._if_exists, self._resume_at = if_exists, resume_at
        self._attrs, self._compression, self._take_over = attrs, compression, take_over
        self._continues, self.news = False, ""

    def choose(self, latest: Iterable[int], name: str | None = None) -> Recording | None:
        """Decide which store is written, as far as that can be known without writing.

        Args:
            latest: the last steps up to `resume_at` that are recorded.
            name: of the store that the interrupted training was recorded to, if that is known.

        Returns:
            What the training continues, as of `resume_at`; None where a new recording begins.

        Raises:
            OutputExistsError: there is a recording, and it may be neither continued nor replaced.
            FormatError: there is something else, or the recording is damaged.
        """
        self.store, self._continues, self.news = self._given, False, ""
        resumes = self._resume_at is not None
        if self._if_exists == NEXT and can_be_numbered(self._given):
            found = recording_to_continue(self._given, latest, name) if resumes else None
            if found is None:
                return None
            self.store = found
        self._continues = resumes
        store = for_writing(self.store)
        overwrites = self._if_exists == OVERWRITE and not resumes
        found_there = existing_recording(store, resume=resumes, overwrite=overwrites)
        return None if found_there is None else Recording(self.store, until=self._resume_at)

    def open(self) -> RecordingWriter:
        """Begin or continue the recording in the chosen store.

        Raises:
            OutputExistsError: another writer has recorded there since.
            RecordingHeldError: another writer is at work there.
            DynamicsError: the store cannot be written.
        """
        if self._if_exists == NEXT and not self._continues and can_be_numbered(self._given):
            recording = self._open_next()
        else:
            overwrites = self._if_exists == OVERWRITE and not self._continues
            recording = self._writer(resume=self._continues, overwrite=overwrites)
        try:
            if self._resume_at is not None:
                recording.rewind(self._resume_at, event=schema.RESUME)
        except BaseException:
            recording.discard()
            raise
        return recording

    def _open_next(self) -> RecordingWriter:
        # The writer of the newest may have died before it committed anything.
        number = max(existing_numbers(self._given), default=1)
        while True:
            self.store = numbered(self._given, number)
            try:
                recording = self._writer()
                break
            except (OutputExistsError, RecordingHeldError):
                number += 1
            except FormatError:
                if number not in existing_numbers(self._given):
                    raise
                number += 1
        if number > 1:
            what = "is there already"
            if self._resume_at is not None:
                what = f"does not reach step {self._resume_at}, or is being written"
            self.news = (
                f"{store_name(self._given)} {what}: this training is recorded to "
                f"{name_of(self.store)}."
            )
        return recording

    def _writer(self, **allowed: bool) -> RecordingWriter:
        return RecordingWriter(
            self.store,
            self._attrs,
            take_over=self._take_over,
            compression=self._compression,
            **allowed,
        )


def checked_step(resume_at: object) -> int | None:
    """The step at which training resumes, as an int.

    Raises:
        DynamicsError: it is no whole number from 0 on.
    """
    step = None if resume_at is None else whole_number(resume_at)
    if resume_at is not None and (step is None or step < 0):
        raise DynamicsError(
            f"resume_at takes the number of optimizer steps done, or None; found {resume_at!r}."
        )
    return step


def checked_attrs(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's attributes of a recording, as JSON has them.

    Raises:
        DynamicsError: JSON cannot hold them, or one would hide what the store is.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(attrs or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise DynamicsError(
            f"attrs takes names and values that JSON can hold; found {attrs!r} ({one_line(error)})."
        ) from error
    if taken := {"format", "format_version"} & plain.keys():
        raise DynamicsError(f"attrs may not set {min(taken)!r}, which says what the store is.")
    return plain
