"""Recordings in Icechunk repositories, where each commit of a recording is one of the repository.

Icechunk (https://icechunk.io) keeps Zarr stores with transactions: what a writer does is seen by
nobody until it commits, and then as a whole, also on object stores. Of two writers the one that
commits later is refused.
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
    """The Zarr store of a repository's branch, for writing: `commit` and go on.

    Args:
        repository: where.
    """

    def __init__(self, repository: "Repository"):
        self._repository = repository
        super().__init__(repository.writable_session(BRANCH).store)

    @property
    def supports_consolidated_metadata(self) -> bool:
        """Arrays' own metadata are part of each commit; nothing has to be gathered from them."""
        return False

    def with_read_only(self, read_only: bool = False) -> Any:
        """The store of the session itself."""
        return self._store.with_read_only(read_only)

    def commit(self, message: str) -> None:
        """Show all that was written since the last commit.

        Raises:
            RecordingHeldError: somebody else has committed since; nothing of this is shown.
        """
        from icechunk import ConflictError, IcechunkError

        session = self._session
        if not session.has_uncommitted_changes:
            return
        try:
            session.commit(message)
        except ConflictError as conflict:
            raise RecordingHeldError(
                f"{self} was changed by somebody else since this writer's last commit; this writer "
                "stops, and what it committed before stays. Record to another path."
            ) from conflict
        except IcechunkError as error:
            raise OSError(f"{self} cannot be committed to: {_reason(error)}") from error
        self.renew()

    async def set(self, key: str, value: Buffer) -> None:
        """See `zarr.abc.store.Store.set`; an OSError is one line, Icechunk's are twenty."""
        from icechunk import IcechunkError

        try:
            await self._store.set(key, value)
        except IcechunkError as error:
            raise OSError(f"{self} does not take {key}: {_reason(error)}") from error

    def renew(self) -> None:
        """Forget what is not committed, and see what others have."""
        self._store = self._repository.writable_session(BRANCH).store

    @property
    def _session(self) -> Any:
        return self._store.session  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return told(self._repository)


def is_repository(store: object) -> "TypeIs[Repository]":
    """Whether this is an Icechunk repository."""
    icechunk = sys.modules.get("icechunk")  # else nobody can have made one
    return icechunk is not None and isinstance(store, icechunk.Repository)


def is_session_store(store: object) -> bool:
    """Whether this is the store of one session, which cannot go on after its first commit."""
    icechunk = sys.modules.get("icechunk")
    return icechunk is not None and isinstance(store, icechunk.IcechunkStore)


def is_repository_folder(path: Path) -> bool:
    """Whether a local directory holds a repository."""
    return (path / "refs" / f"branch.{BRANCH}").is_dir()


def opened_folder(path: Path) -> "Repository":
    """The repository in a local directory.

    Raises:
        DynamicsError: icechunk is not installed.
        FormatError: it cannot be opened.
    """
    try:
        import icechunk
    except ImportError as missing:
        raise require_extra("icechunk", missing) from missing
    try:
        return icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    except icechunk.IcechunkError as error:
        raise FormatError(f"{path} is no Icechunk repository: {_reason(error)}.") from error


def for_reading(repository: "Repository") -> Store:
    """The store of the branch's last commit.

    Raises:
        FormatError: it cannot be read.
    """
    from icechunk import IcechunkError

    try:
        return repository.readonly_session(BRANCH).store
    except IcechunkError as error:
        raise FormatError(f"{told(repository)} cannot be read: {_reason(error)}.") from error


def told(repository: "Repository") -> str:
    """The repository as messages name it."""
    return f"the Icechunk repository {repository.storage}"


def _reason(error: Exception) -> str:
    """The first line of an error, which goes on with places in Icechunk's own code."""
    return str(error).strip().splitlines()[0].removeprefix("x ").strip()
