"""Origins: tokens that change when a file may have changed. A second analysis relies on them."""

import os
import time
from pathlib import Path

# Two changes within the resolution of a file system's clock leave the same time stamp. A file
# changed so recently (nanoseconds) has no origin yet; git's index treats such a file the same way.
RACY = 2 * 10**9
ABSENT = "absent"


def file_origin(path: str | Path) -> str | None:
    """A token that changes whenever the file's content may have changed, without reading it.

    It is made of the size, the time when the content changed, the time when the inode changed, and
    the inode. The inode's time also shows a change whose time stamp was set back (`cp -p`,
    `rsync -t`).

    Returns:
        `ABSENT` where there is no file. None where changes cannot be seen: the file was changed
        just now or in the future, or the file system does not answer.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ABSENT
    except OSError:
        return None
    if time.time_ns() - status.st_mtime_ns < RACY:
        return None
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"
