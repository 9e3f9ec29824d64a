"""Where stored numbers come from, told without reading them: what a second analysis relies on."""

import os
import time
from pathlib import Path

# Two changes within the resolution of a file system's clock leave the same time stamp. A file
# changed this lately (nanoseconds) has no origin yet, as git's index has none for it.
RACY = 2 * 10**9
ABSENT = "absent"


def file_origin(path: str | Path) -> str | None:
    """A token that changes whenever the file's content may have changed, without reading it.

    Size, times of the last change of content and of inode, inode. The inode's time also tells a
    change whose time stamp was set back (`cp -p`, `rsync -t`). `ABSENT` where there is no file.

    Returns:
        None where that cannot be told: the file was changed just now or in the future, or the
        file system does not answer.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return ABSENT
    except OSError:
        return None
    if time.time_ns() - found.st_mtime_ns < RACY:
        return None
    return f"{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"
