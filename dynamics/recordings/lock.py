"""One writer per recording: a lock in the store says who writes.

The lock is the object `writer/zarr.json`, a Zarr group. So it works on every store, and every tool
that opens the store finds a valid group. A writer that is killed leaves its lock behind; the next
writer on the same machine sees that the process is gone, and takes over. Two writers can both
believe that they hold the lock: where a store cannot create an object only if it does not exist
(fsspec's stores), or where two take over at the same moment. Then the writer whose lock was
overwritten notices it before its next commit.
"""

import json
import os
import platform
import uuid
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zarr.abc.store import Store

from dynamics.errors import DynamicsError, RecordingHeldError, one_line
from dynamics.recordings import stores
from dynamics.recordings.paths import WRITER

# Locks of this process by token. A writer that was garbage-collected without closing holds none.
_LIVE: "weakref.WeakValueDictionary[str, WriterLock]" = weakref.WeakValueDictionary()


class WriterLock:
    """The lock of a recording, held from construction until `release`.

    Args:
        store: of the recording.
        take_over: take the lock from a writer that holds it; that writer fails at its next commit.

    Raises:
        RecordingHeldError: another writer holds the lock and may be alive.
        DynamicsError: the store cannot be written.
    """

    def __init__(self, store: Store, *, take_over: bool = False):
        self._store = store
        self._mine = {
            **_this_process(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        content = _document(self._mine)
        _LIVE[self._mine["token"]] = self  # before another thread of this process can see it
        try:
            stores.put_new(store, WRITER, content)
            holder = self._holder()
            if holder != self._mine:
                if not take_over and not _is_dead(holder):
                    raise RecordingHeldError(
                        f"{stores.store_name(store)} is being written by {_holder_name(holder)}. "
                        "Wait until it has closed the recording, or record to another path; if it "
                        "is dead, pass take_over=True."
                    )
                stores.put(store, WRITER, content)
            stores.commit(self._store, "a writer begins")
        except OSError as error:
            raise DynamicsError(
                f"{stores.store_name(store)} cannot be written: {one_line(error)}."
            ) from error

    def check(self) -> None:
        """Check that no other writer took the recording over.

        Raises:
            RecordingHeldError: another writer did.
        """
        holder = self._holder()
        if self._is_of_the_parent():
            raise RecordingHeldError(
                f"{stores.store_name(self._store)} is written by the process that this one was "
                "forked from. Record to another path."
            )
        if holder != self._mine:
            what = f"was taken over by {_holder_name(holder)}"
            if not holder:
                what = (
                    "was deleted or moved, or was taken over by another writer, which has closed it"
                )
            raise RecordingHeldError(
                f"{stores.store_name(self._store)} {what}. This writer stops; what it has "
                "committed is kept. Record to another path."
            )

    def release(self) -> None:
        """Let others write, unless another writer took the lock over. Safe to call twice."""
        if self._is_of_the_parent():
            return
        stores.renew(self._store)
        if self._holder() == self._mine:
            stores.delete(self._store, WRITER)
            stores.commit(self._store, "the writer is done")
        _LIVE.pop(self._mine["token"], None)

    def _holder(self) -> Mapping[str, Any]:
        return _holder_of(self._store)

    def _is_of_the_parent(self) -> bool:
        return bool(self._mine["pid"] != os.getpid())


def held_by(store: Store) -> str | None:
    """Who writes a recording and may be alive; None if nobody does."""
    holder = _holder_of(store)
    return None if _is_dead(holder) else _holder_name(holder)


def _holder_of(store: Store) -> Mapping[str, Any]:
    try:
        holder = json.loads(stores.get(store, WRITER) or b"{}").get("attributes", {})
    except (ValueError, AttributeError):
        return {"host": "an unreadable lock"}
    return holder if isinstance(holder, dict) else {}


def _document(holder: Mapping[str, Any]) -> bytes:
    group = {"zarr_format": 3, "node_type": "group", "attributes": holder}
    return json.dumps(group).encode()


def _holder_name(holder: Mapping[str, Any]) -> str:
    here = holder.get("host") == platform.node() and holder.get("pid") == os.getpid()
    who = "this process" if here else f"process {holder.get('pid')} on {holder.get('host')}"
    return f"{who} since {holder.get('since')}"


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),
    }


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether the process is surely gone; False where this process cannot know."""
    me = _this_process()
    if not holder:
        return True  # released in the meantime
    if holder.get("host") != me["host"]:
        return False
    if holder.get("boot") != me["boot"]:
        return True  # the machine was restarted
    pid = holder.get("pid")
    if holder.get("pid_namespace") != me["pid_namespace"] or not isinstance(pid, int):
        return False  # a container whose processes are not visible from here
    if pid == me["pid"] and holder.get("started") == me["started"]:
        return holder.get("token") not in _LIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # a process of another user
    return holder.get("started") != _started(pid)  # else another process has this number now


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "" where it is gone, or there is no /proc.

    A zombie counts as gone: it has ended, and only its parent has not noticed yet.
    """
    # "pid (name) state ppid ..."; the name may contain blanks and brackets
    fields = _line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
