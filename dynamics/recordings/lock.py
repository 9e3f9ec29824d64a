"""One writer per recording: who holds it stands in the store, as a group of its own.

The lock is the object `writer/zarr.json`, so that it works on every store, and any tool that opens
the store finds a valid group. A writer that was killed leaves its lock behind; another on the same
machine sees that the process is gone and takes over. Where stores cannot create an object only if
it does not exist (fsspec's), or two take over in the same moment, both believe to hold it: the
one whose lock was overwritten learns it before its next commit.
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

# Of this process, by token: a writer that was forgotten without closing holds nothing any more.
_LIVE: "weakref.WeakValueDictionary[str, WriterLock]" = weakref.WeakValueDictionary()


class WriterLock:
    """Held from construction until `release`.

    Args:
        store: of the recording.
        take_over: take it from whoever holds it, who is refused at its next commit.

    Raises:
        RecordingHeldError: another writer holds it and may be alive.
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
        try:
            stores.put_new(store, WRITER, content)
            holder = self._holder()
            if holder != self._mine:
                if not take_over and not _is_dead(holder):
                    raise RecordingHeldError(
                        f"{stores.told(store)} is being written by {_told(holder)}. Wait until "
                        "it has closed the recording; if it is dead, pass take_over=True."
                    )
                stores.put(store, WRITER, content)
            stores.commit(self._store, "a writer begins")
            _LIVE[self._mine["token"]] = self
        except OSError as error:
            raise DynamicsError(
                f"{stores.told(store)} cannot be written: {one_line(error)}."
            ) from error

    def check(self) -> None:
        """Make sure that nobody took the recording over.

        Raises:
            RecordingHeldError: somebody did.
        """
        holder = self._holder()
        if holder != self._mine:
            by = _told(holder) if holder else "somebody who has closed it since"
            raise RecordingHeldError(
                f"{stores.told(self._store)} was taken over by {by}; this writer stops, and what "
                "it committed before stays. Record to another path."
            )

    def release(self) -> None:
        """Let others write, unless somebody took it over. Twice is once."""
        stores.renew(self._store)
        if self._holder() == self._mine:
            stores.delete(self._store, WRITER)
            stores.commit(self._store, "the writer is done")
        _LIVE.pop(self._mine["token"], None)

    def _holder(self) -> Mapping[str, Any]:
        try:
            found = json.loads(stores.get(self._store, WRITER) or b"{}").get("attributes", {})
        except (ValueError, AttributeError):
            return {"host": "an unreadable lock"}
        return found if isinstance(found, dict) else {}


def _document(holder: Mapping[str, Any]) -> bytes:
    group = {"zarr_format": 3, "node_type": "group", "attributes": holder}
    return json.dumps(group).encode()


def _told(holder: Mapping[str, Any]) -> str:
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
    """Whether the process is gone for sure; False where that cannot be told from here."""
    me = _this_process()
    if not holder:
        return True  # released between two looks
    if holder.get("host") != me["host"]:
        return False
    if holder.get("boot") != me["boot"]:
        return True  # the machine was started anew
    pid = holder.get("pid")
    if holder.get("pid_namespace") != me["pid_namespace"] or not isinstance(pid, int):
        return False  # a container whose processes cannot be seen from here
    if pid == me["pid"] and holder.get("started") == me["started"]:
        return holder.get("token") not in _LIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's process
    return holder.get("started") != _started(pid)  # else the number was given to another process


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "" where the system has no /proc.

    A zombie is as dead as it can be: its parent did not ask yet.
    """
    # "pid (name) state ppid ...", where the name may hold blanks and brackets
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
