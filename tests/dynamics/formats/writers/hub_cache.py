"""Writes a Hugging Face cache as a download would, which cannot be run without the hub."""

import hashlib
import os


class Cache:
    """A cache with one model, laid out as huggingface_hub's `file_download.py` says.

    `models--ORG--NAME/blobs/HASH` holds a file's bytes, `snapshots/COMMIT/FILE` is a relative link
    to it, `refs/NAME` holds the commit without a line break.
    """

    def __init__(self, directory):
        self.directory = directory
        self.repository = directory / "models--org--suite"
        for each in ("blobs", "refs", "snapshots"):
            (self.repository / each).mkdir(parents=True)

    def add(self, refs, files):
        """The files of a directory as the snapshot that the refs stand for."""
        commit = hashlib.sha1(repr(refs).encode()).hexdigest()
        snapshot = self.repository / "snapshots" / commit
        snapshot.mkdir()
        for file in files.iterdir():
            content = file.read_bytes()
            blob = self.repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        for ref in refs:
            path = self.repository / "refs" / ref
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)
        return snapshot
