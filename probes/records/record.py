"""One record on its way from the training thread to the store."""

import time
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat, SupportsInt

import numpy as np
import torch

from dynamics.recordings import RecordingWriter
from probes.records.rounding import StorageRounding, StorageWarning, as_numpy


class Record:
    """The tensors of one record, copied to the CPU, until they are written.

    Attributes:
        step: optimizer steps done.
        logged: name -> value of its scalars.
        tokens: seen so far; None where unknown.
        copied: events of a GPU; when they have happened, the copies are complete.
        defects: array path -> one line that says what is wrong with it.
        losses: what rounding to the stored dtype lost, once it is written.
        made: when it was made, of `time.perf_counter`.
        stored: array path -> its numbers as they are stored, once it is written.
        attrs: array path -> attributes of the array.
    """

    def __init__(self, step: int, logged: dict[str, SupportsFloat]):
        self.step = step
        self.logged = logged
        self.tokens: SupportsInt | None = None
        self.copied: list[torch.cuda.Event] = []
        self.defects: dict[str, str] = {}
        self.losses: list[StorageWarning] = []
        self.made = time.perf_counter()
        self.stored: dict[str, np.ndarray] = {}
        self.attrs: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, path: str, tensor: torch.Tensor, extra: Mapping[str, Any] | None = None) -> None:
        """Add the tensor of one array; `extra` are further attributes of that array."""
        self._tensors[path] = tensor
        self.attrs[path] = dict(extra or {})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The copies."""
        return list(self._tensors.values())

    def taken_out(self, which: Callable[[str], bool]) -> "Record":
        """A record of the tensors at these array paths, which this one gives away."""
        other = Record(self.step, {})
        for path in [path for path in self._tensors if which(path)]:
            other.add(path, self._tensors.pop(path))
        return other

    def write(self, recording: RecordingWriter, rounding: StorageRounding) -> dict[str, np.ndarray]:
        """Append this record to the recording; the writer's thread calls it.

        Args:
            recording: where to.
            rounding: to the dtype that weights and gradients are stored in.

        Returns:
            Array path -> its numbers before rounding.
        """
        for event in self.copied:
            event.synchronize()
        matrices, stored = {}, self.stored
        for path, tensor in self._tensors.items():
            matrices[path] = stored[path] = as_numpy(tensor)
            kept = rounding.round(path, tensor)
            if kept is not tensor:
                stored[path] = as_numpy(kept)
                self.losses += rounding.losses(self.step, path, matrices[path], kept)
            self.attrs[path]["source_dtype"] = str(kept.dtype).removeprefix("torch.")
        scalars = {name: float(value) for name, value in self.logged.items()}
        recording.append(
            self.step,
            stored,
            attrs=self.attrs,
            scalars=scalars,
            tokens=None if self.tokens is None else int(self.tokens),
        )
        return matrices
