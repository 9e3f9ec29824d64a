"""Recordings in Icechunk repositories: each commit of a recording is a commit of the repository.

Icechunk (https://icechunk.io) adds transactions to Zarr stores, on object stores too. Nobody sees
what a writer does until it commits; then everybody sees all of it at once. Of two writers, the one
that commits later gets an error.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import WrapperStore

from dynamics.errors import FormatError, RecordingHeldError, require_extra

if TYPE_CHECKING:
    from icechunk import Repository
    from typing_extensions import TypeIs

BRANCH = "main"


class TransactionalStore(WrapperStore[Store]):
    """The Zarr store of a repository's main branch, for writing; it stays usable after `commit`."""

    def __init__(self, repository: "Repository"):
        self._repository = repository
        super().__init__(repository.writable_session(BRANCH).store)

    @property
    def supports_consolidated_metadata(self) -> bool:
        """False: each commit contains the own metadata of the arrays."""
        return False

    def with_read_only(self, read_only: bool = False) -> Any:
        """The store of the session itself."""
        return self._store.with_read_only(read_only)

    def commit(self, message: str) -> None:
        """Commit all that was written since the last commit.

        Raises:
            RecordingHeldError: another writer has committed since; nothing is committed.
        """
        from icechunk import ConflictError, IcechunkError

        session = self._session
        if not session.has_uncommitted_changes:
            return
        try:
            session.commit(message)
        except ConflictError as conflict:
            raise RecordingHeldError(
                f"{self} was changed by another writer since the last commit of this one. This "
                "writer stops; what it has committed is kept. Record to another path."
            ) from conflict
        except IcechunkError as error:
            raise OSError(f"{self} cannot be committed to: {_reason(error)}") from error
        self.renew()

    async def set(self, key: str, value: Buffer) -> None:
        """See `zarr.abc.store.Store.set`; raises OSError of one line (Icechunk's have twenty)."""
        from icechunk import IcechunkError

        try:
            await self._store.set(key, value)
        except IcechunkError as error:
            raise OSError(f"{self} does not accept {key}: {_reason(error)}") from error

    def renew(self) -> None:
        """Drop what is not committed, and see what others have committed."""
        self._store = self._repository.writable_session(BRANCH).store

    @property
    def _session(self) -> Any:
        return self._store.session  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return repository_name(self._repository)


def is_repository(store: object) -> "TypeIs[Repository]":
    """Whether an object is an Icechunk repository."""
    icechunk = sys.modules.get("icechunk")  # else no repository can exist in this process
    return icechunk is not None and isinstance(store, icechunk.Repository)


def is_session_store(store: object) -> bool:
    """Whether an object is the store of one session, which ends with its first commit."""
    icechunk = sys.modules.get("icechunk")
    return icechunk is not None and isinstance(store, icechunk.IcechunkStore)


def is_repository_folder(path: Path) -> bool:
    """Whether a local directory is an Icechunk repository."""
    return (path / "refs" / f"branch.{BRANCH}").is_dir()


def open_folder(path: Path) -> "Repository":
    """The repository in a local directory.

    Raises:
        DynamicsError: icechunk is not installed.
        FormatError: the repository cannot be opened.
    """
    try:
        import icechunk
    except ImportError as missing:
        raise require_extra("icechunk", missing) from missing
    try:
        return icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    except icechunk.IcechunkError as error:
        raise FormatError(
            f"{path} is not a readable Icechunk repository: {_reason(error)}."
        ) from error


def for_reading(repository: "Repository") -> Store:
    """The store as of the last commit of the main branch.

    Raises:
        FormatError: it cannot be read.
    """
    from icechunk import IcechunkError

    try:
        return repository.readonly_session(BRANCH).store
    except IcechunkError as error:
        raise FormatError(
            f"{repository_name(repository)} cannot be read: {_reason(error)}."
        ) from error


def repository_name(repository: "Repository") -> str:
    """How messages call the repository."""
    return f"the Icechunk repository {repository.storage}"


def _reason(error: Exception) -> str:
    """The first line of an error; the others are places in Icechunk's own code."""
    return str(error).strip().splitlines()[0].removeprefix("x ").strip()
