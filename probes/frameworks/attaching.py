"""What the callbacks have in common: a recorder for each training, which no training dies of."""

import warnings
from collections.abc import Callable
from typing import Any

from dynamics.errors import OutputExistsError, RecordingHeldError
from dynamics.recordings import StoreLike, absolute
from probes.live.settings import Live, live_settings
from probes.live.trackers import Tracker
from probes.recorder import Recorder
from probes.records.opening import NEXT


class NotRecordedWarning(UserWarning):
    """A training goes on without being recorded, or its recording ended early."""


class AttachesRecorder:
    """Attaches a recorder when a training begins, and closes it when the training ends.

    Frameworks begin a training again by themselves: after an out-of-memory error with a smaller
    batch, or for each trial of a search. So `if_exists` is "next" here by default.

    Args:
        store: path or URL of the recording, or any zarr Store.
        options: the other arguments of `Recorder`. With live=True, or a `Live` without `to`, live
            values go to what the training reports to.

    Attributes:
        recorder: that of the training that is under way, or None.
    """

    def __init__(self, store: StoreLike, **options: Any):
        self._store = absolute(store)
        self._options = {"if_exists": NEXT, **options}
        self.recorder: Recorder | None = None

    @property
    def store(self) -> StoreLike:
        """What the training is recorded to: the given store, or maybe a numbered one beside it."""
        return self._store if self.recorder is None else self.recorder.store

    def close(self) -> None:
        """Finish the recording and leave the model as it was. Safe to call twice.

        Raises:
            RuntimeError: the writer failed.
        """
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.close()

    def _begin(
        self,
        model: Any,
        optimizer: Any,
        continuing: str | None,
        reports: Callable[[], Tracker],
        **defaults: Any,
    ) -> Recorder | None:
        """Attach a recorder; None where the store can take no further recording.

        `reports` makes what live values go to where the user names nobody.
        """
        try:
            self.close()  # an earlier training may have ended in an exception
        except RuntimeError as error:
            warnings.warn(str(error), NotRecordedWarning, stacklevel=3)
        options = {**defaults, **self._options}
        live = options.get("live")
        goes_there = live is True or (isinstance(live, Live) and live.to is None)
        options["live"] = live_settings(live, reports() if goes_there else None)
        options["attrs"] = {**defaults["attrs"], **(self._options.get("attrs") or {})}
        recorder = Recorder(model, optimizer, self._store, **options)
        try:
            recorder.attach(continuing=continuing)
        except (OutputExistsError, RecordingHeldError) as error:
            if self._options["if_exists"] != NEXT:
                raise
            warnings.warn(
                f"This training is not recorded: {error}", NotRecordedWarning, stacklevel=3
            )
            return None
        self.recorder = recorder
        return recorder

    def __getstate__(self) -> dict[str, Any]:
        """Without the recorder: a copy of a callback records nothing before its own training."""
        return {**self.__dict__, "recorder": None}
