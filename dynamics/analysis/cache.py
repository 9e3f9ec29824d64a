"""Spectra on disk, by the numbers they were computed from: what an analysis measures once only."""

import hashlib
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dynamics.errors import DynamicsError, local_path
from dynamics.runs.dependencies import Dependency, TracedRun, trace_from_json, trace_to_json
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored, Spectrum
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.spectrum import MEASURE_VERSION

_APPLICATION = 0x6C64796E  # "ldyn", in the file's header
_VERSION = 2
_FLUSH_SECONDS = 1.0
_DAMAGED = (sqlite3.Error, UnicodeError)  # the latter from the text of an error
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS spectra (
    content BLOB PRIMARY KEY, s BLOB NOT NULL, "rows" INTEGER NOT NULL, cols INTEGER NOT NULL,
    rank_bound INTEGER NOT NULL, error REAL NOT NULL, noise_floor REAL NOT NULL,
    checksum BLOB NOT NULL, storage_noise_floor REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cells (
    cell BLOB PRIMARY KEY, dependencies BLOB NOT NULL, content BLOB NOT NULL,
    checksum BLOB NOT NULL
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
# The first version counted no roundings of training: other spectra are what they were.
_FROM_VERSION_1 = """
BEGIN IMMEDIATE;
ALTER TABLE spectra ADD COLUMN storage_noise_floor REAL;
DELETE FROM cells;
PRAGMA user_version = 2;
COMMIT;
"""
# Other releases of these may give other last digits, and an analysis names the ones it was made by.
_COMPUTED_BY = f"{MEASURE_VERSION} numpy {np.__version__} scipy {scipy.__version__}"


def content_key(matrix: Dense | Factored | Difference, backend: Backend | None = None) -> bytes:
    """A hash of everything that `spectrum(matrix)` is computed from, and of what computes it."""
    backend = backend or NumpyBackend()
    digest = hashlib.blake2b((_COMPUTED_BY + backend.version).encode(), digest_size=20)
    if isinstance(matrix, Factored):
        other: tuple[object, ...] = (matrix.scale, matrix.dtype, matrix.transposed)
        if matrix.noise is not None:  # of quantised factors; the keys of others stay what they were
            other = (*other, matrix.noise, *(matrix.storage_noise or ()))
        parts = [matrix.left, matrix.right]
    elif isinstance(matrix, Difference):
        other = (matrix.now.dtype, matrix.before.dtype, matrix.merges, matrix.rank_bound)
        parts = [matrix.now.values, matrix.before.values]
        parts += [*_errors(matrix.now), *_errors(matrix.before)]
        for position, adapter in enumerate(matrix.adapters):  # their products were rounded
            if adapter is not None:
                other = (*other, position, adapter.scale)
                parts += [adapter.left, adapter.right]
        if matrix.rounded_in_training is not None:
            other = (*other, matrix.rounded_in_training[1])
    else:
        other, parts = (matrix.dtype,), [matrix.values, *_errors(matrix)]
    digest.update(repr((type(matrix).__name__, other)).encode())
    for part in parts:
        digest.update(backend.digest(part))
    return digest.digest()


def study_key(content: bytes) -> bytes:
    """The key of `study_spectrum` of the numbers with this key."""
    return hashlib.blake2b(content + _computed_by(), digest_size=20).digest()


@cache
def _computed_by() -> bytes:
    return f"study torch {version('torch')}".encode()  # read from a file


def _errors(matrix: Dense) -> tuple[np.ndarray, ...]:
    return () if matrix.errors is None else matrix.errors.arrays


class SpectrumCache:
    """A file of spectra, made if it is missing; a context manager.

    What is put into it is written once a second and at the end, each time whole or not at all.
    Two processes may use one file.

    Args:
        path: of the file.
        backend: see `gpu_backend.backend_version`; two that differ share no spectra.

    Raises:
        DynamicsError: it is a URL; the file is damaged, of another version, or something else; the
            file system refuses it, or another process keeps it locked.
    """

    def __init__(self, path: str | Path, backend: str = ""):
        self.path = local_path(path)
        self._computed_by = (_COMPUTED_BY + backend).encode()
        self._spectra: dict[bytes, Spectrum] = {}
        self._cells: dict[bytes, tuple[bytes, bytes, bytes]] = {}
        self._flushed = time.monotonic()

    def __enter__(self) -> "SpectrumCache":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are ours: a pending one would keep others out during a long computation.
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._refused(error) from error
        try:
            self._check()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self._connection):
            self._flush()

    def of_cell(self, cell: bytes, run: TracedRun) -> tuple[bytes | None, bool]:
        """(the content that a cell had when it was measured last, whether it still must have it).

        It must where nothing that it was made from has changed since. None: it never was measured.
        """
        cell = self._salted(cell)
        row = self._cells.get(cell) or self._row(
            "SELECT dependencies, content, checksum FROM cells WHERE cell = ?", cell
        )
        if row is None:
            return None, False
        dependencies, content, checksum = row
        if checksum != _checksum(cell, dependencies, content):
            raise self._damaged("the origins of a matrix do not fit their checksum")
        origins = trace_from_json(dependencies)
        return content, all(run.origin_of(each) == origin for each, origin in origins)

    def of_content(self, content: bytes) -> Spectrum | None:
        """The spectrum of these numbers."""
        if content in self._spectra:
            return self._spectra[content]
        row = self._row(
            'SELECT s, "rows", cols, rank_bound, error, noise_floor, storage_noise_floor, checksum'
            " FROM spectra WHERE content = ?",
            content,
        )
        if row is None:
            return None
        if row[-1] != _checksum(content, *_given(row[:-1])):
            raise self._damaged("a spectrum does not fit its checksum")
        return Spectrum(np.frombuffer(row[0], dtype="<f8").astype(np.float64), *row[1:-1])

    def put(self, content: bytes, spectrum: Spectrum) -> None:
        """Keep the spectrum of these numbers."""
        if np.isnan([spectrum.error, spectrum.noise_floor]).any():
            return  # of numbers near the largest float64; SQLite has no NaN
        self._spectra[content] = spectrum
        self._flush_now_and_then()

    def put_cell(self, cell: bytes, trace: Mapping[Dependency, str | None], content: bytes) -> None:
        """Keep what a cell was made from (`TracedRun.trace`), if it can be told again."""
        if None in trace.values():
            return
        cell, dependencies = self._salted(cell), trace_to_json(trace).encode()
        self._cells[cell] = (dependencies, content, _checksum(cell, dependencies, content))
        self._flush_now_and_then()

    def _salted(self, cell: bytes) -> bytes:
        return hashlib.blake2b(cell + self._computed_by, digest_size=20).digest()

    def _check(self) -> None:
        try:
            if not self._connection.execute("PRAGMA page_count").fetchone()[0]:
                self._connection.executescript(_SCHEMA)
            application = self._connection.execute("PRAGMA application_id").fetchone()[0]
            if self._version() == 1 and application == _APPLICATION:
                self._connection.executescript(_FROM_VERSION_1)
            version = self._version()
        except sqlite3.OperationalError as error:
            raise self._refused(error) from error
        except _DAMAGED as error:
            raise self._damaged(error) from error
        if application != _APPLICATION:
            raise self._damaged("an SQLite file of something else")
        if version != _VERSION:
            raise DynamicsError(
                f"{self.path} is a cache of version {version}, this release has {_VERSION}; "
                "delete it, and everything is measured once more."
            )

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _row(self, query: str, key: bytes) -> Any:
        try:
            return self._connection.execute(query, (key,)).fetchone()
        except sqlite3.OperationalError as error:
            raise self._refused(error) from error
        except _DAMAGED as error:
            raise self._damaged(error) from error

    def _flush_now_and_then(self) -> None:
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        spectra = []
        for content, each in self._spectra.items():
            s = each.s.astype("<f8").tobytes()
            sizes = (int(each.rows), int(each.cols), int(each.rank_bound))
            storage = each.storage_noise_floor
            storage = None if storage is None else float(storage)
            row = (s, *sizes, float(each.error), float(each.noise_floor))
            spectra.append((content, *row, _checksum(content, *_given((*row, storage))), storage))
        cells = [(cell, *row) for cell, row in self._cells.items()]
        try:
            if spectra or cells:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "INSERT OR REPLACE INTO spectra VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", spectra
                )
                self._connection.executemany(
                    "INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?)", cells
                )
                self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise self._refused(error) from error
        except _DAMAGED as error:
            raise self._damaged(error) from error
        self._spectra, self._cells = {}, {}
        self._flushed = time.monotonic()

    def _damaged(self, why: object) -> DynamicsError:
        return DynamicsError(
            f"{self.path} is not a readable cache of spectra: {_line(why)}. If it is one, delete "
            "it, and everything is measured once more; else choose another output, or --no-cache."
        )

    def _refused(self, why: object) -> DynamicsError:
        return DynamicsError(
            f"{self.path} cannot be used as a cache: {_line(why)}. Choose another output, or do "
            "without (--no-cache); if it is locked, wait for the analysis that uses it."
        )


def _given(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return row if row[-1] is not None else row[:-1]  # as in files of the first version


def _checksum(*row: object) -> bytes:
    return hashlib.blake2b(repr(row).encode(), digest_size=8).digest()


def _line(why: object) -> str:
    return " ".join(str(why).split())
