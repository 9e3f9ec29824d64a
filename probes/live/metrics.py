"""`LiveMetrics`: measures records beside the training, and hands the values to a tracker."""

import queue
import sys
import time
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from dynamics.components import COMPONENTS
from dynamics.errors import one_line
from dynamics.metrics import METRICS
from dynamics.metrics.modules import mean, tracker_key
from dynamics.recordings import Recording
from dynamics.runs.differences import is_finite
from dynamics.runs.run import Event, Spectrum
from dynamics.schema import NOISE_FLOOR, UPDATE, Status
from dynamics.spectra.backend import NumpyBackend
from dynamics.spectra.spectrum import spectrum
from probes.live.recent import Arrays, Attrs, RecentRecords
from probes.live.settings import Live
from probes.live.threads import one_blas_thread
from probes.live.trackers import tracker_of
from probes.live.turns import Turns

_RANK_BOUND = "rank_bound"


class LiveSubsetWarning(UserWarning):
    """A live value is the mean over some of the layers, because of the time that all take."""


class NotShownWarning(UserWarning):
    """Live values did not reach the tracker; training and recording go on."""


class LiveMetrics:
    """Measures each record after it was written; the training thread fetches the values.

    `measure`, `note` and `alarm` are called by the thread that writes, `report` by the one that
    trains: trackers such as MLflow keep the active run of a thread. A step reports one record at
    most, because some trackers count the calls.

    Args:
        live: what to measure; with somebody who gets it.
        recorded: the kinds that the recorder records.
        spectra_only: whether records hold spectra, which take no time to measure.

    Raises:
        DynamicsError: a kind that was asked for is not recorded.
    """

    def __init__(self, live: Live, recorded: Collection[str], spectra_only: bool):
        self._live = live.among(recorded)
        assert self._live.kinds is not None
        self._kinds = tuple(self._live.kinds)
        self._keeps_weights = UPDATE in self._kinds and not spectra_only
        self._tracker = tracker_of(live.to)
        self._turns = Turns(None if spectra_only else live.budget)
        self._recent = RecentRecords({}, self._keeps_weights)
        self._values: queue.SimpleQueue[tuple[int, dict[str, float]]] = queue.SimpleQueue()
        self._alarms: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._warned: set[type[Warning]] = set()

    # In the thread that writes ---------------------------------------------------------------

    def begin(self, attrs: Mapping[str, Any], continued: Recording | None) -> None:
        """A recording begins, or is continued as of its last record."""
        self._recent = RecentRecords(attrs, self._keeps_weights)
        if continued is not None:
            self._recent.begin_after(continued)

    def note(self, event: Event) -> None:
        """Learn of an event that was written."""
        self._recent.note(event)

    def alarm(self, step: int, text: str) -> None:
        """Show that a check has failed, where the tracker has a place for it."""
        self._alarms.put((step, text))

    def is_kept(self, path: str) -> bool:
        """Whether the array of a record must not change until the next one is measured."""
        return self._recent.is_kept(path)

    def measure(self, step: int, made: float, arrays: Arrays, attrs: Attrs) -> None:
        """Measure a record that was written; nothing that fails here ends the recording.

        Args:
            step: of the record.
            made: when it was made, of `time.perf_counter`.
            arrays: path -> the numbers as they were stored.
            attrs: path -> the attributes of the array.
        """
        self._turns.trained(made)
        try:
            self._recent.push(step, arrays, attrs)
            if self._live.is_due(step):
                with one_blas_thread():
                    self._values.put((step, self._measured(step)))
            self._recent.forget()
        except Exception as error:
            self._warn(NotShownWarning, f"Step {step} was not measured: {one_line(error)}.")

    def _measured(self, step: int) -> dict[str, float]:
        begun = time.perf_counter()
        run = self._recent.run()
        readers = {info.name: read for info, read in COMPONENTS["parameters"](run)}
        self._turns.spend(time.perf_counter() - begun)
        groups = self._live.groups(list(run.matrices.values()))
        spectra: dict[tuple[str, str], list[Spectrum]] = {}
        measured = 0
        for name in self._turns.of_record(run.matrices, groups, len(self._kinds)):
            measured += 1
            backend = NumpyBackend()  # for one matrix: its weight is a term of its update
            for kind in self._kinds:
                matrix = readers[name](step, kind)
                if not isinstance(matrix, Status) and is_finite(matrix, backend.is_finite):
                    found = spectrum(matrix, backend=backend)
                    spectra.setdefault((kind, groups[name]), []).append(found)
        if measured < len(readers):
            self._warn(
                LiveSubsetWarning,
                f"Live metrics measured {measured} of {len(readers)} matrices at step {step}: all "
                f"take more than budget={self._live.budget:g} of the training time. The next "
                "record goes on with the others, and each value is the mean over the matrices that "
                "were measured for it. Choose fewer kinds, or a larger budget.",
            )
        values: dict[str, float] = {}
        for (kind, group), of_group in spectra.items():
            values |= self._values_of(kind, group, of_group)
        return values

    def _values_of(self, kind: str, group: str, spectra: list[Spectrum]) -> dict[str, float]:
        columns = {name: METRICS[name].function for name in self._live.metrics}
        if self._live.bounds:
            columns[_RANK_BOUND] = METRICS[_RANK_BOUND].function
            columns[NOISE_FLOOR] = lambda each: each.noise_floor
        values = {}
        for metric, function in columns.items():
            numbers = [float(function(each)) for each in spectra]  # type: ignore[arg-type]
            numbers = [each for each in numbers if each == each]
            if not numbers:
                continue
            key = tracker_key(kind, metric, group)
            values[key] = mean(numbers)
            if self._live.extremes:
                values[f"{key}/min"], values[f"{key}/max"] = min(numbers), max(numbers)
        return values

    # In the thread that trains ---------------------------------------------------------------

    def report(self, *, everything: bool = False) -> None:
        """Hand the values of the next measured record to the tracker, or those of all records."""
        begun = time.perf_counter()
        while not self._alarms.empty():
            step, text = self._alarms.get()
            self._call(self._tracker.alarm, text, step)
        while not self._values.empty():
            step, values = self._values.get()
            if values:
                self._call(self._tracker.log, values, step)
                if not everything:
                    break
        self._turns.spend(time.perf_counter() - begun)

    def _call(self, function: Any, what: object, step: int) -> None:
        try:
            function(what, step)
        except Exception as error:
            self._warn(
                NotShownWarning,
                f"The tracker did not take the live values of step {step} "
                f"({one_line(error)}); training and recording go on.",
            )

    def _warn(self, category: type[Warning], text: str) -> None:
        if category in self._warned:
            return
        self._warned.add(category)
        try:
            warnings.warn(text, category, stacklevel=4)
        except Warning as told:  # a filter makes errors of warnings; training goes on
            sys.stderr.write(f"{category.__name__}: {told}\n")
