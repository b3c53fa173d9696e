# SPDX-License-Identifier: Apache-2.0
"""The temporary folder of one run: made when it starts, gone when it ends, and swept up later if it was killed."""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from apache_beam.io.filesystems import FileSystems

from transforms import files

_PREFIX = "knn-train-"
_LOCK = "owner.lock"


@contextmanager
def create(temp_location: str | None) -> Iterator[str]:
    """A new folder under `temp_location`, on any Beam filesystem; under the system's temporary folder if None.

    A local folder holds a lock for as long as its run lives, so the folder of a run that was killed is told apart,
    and is removed by the next run in the same place.
    """
    parent = temp_location or tempfile.gettempdir()
    if not files.is_local(parent):
        folder = FileSystems.join(parent, _PREFIX + uuid.uuid4().hex)
        try:
            yield folder
        finally:
            files.remove_folder(folder)
        return
    os.makedirs(parent, exist_ok=True)
    _sweep(parent)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    try:
        with open(os.path.join(folder, _LOCK), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        files.remove_folder(folder)


def _sweep(parent: str) -> None:
    for path in glob.glob(os.path.join(glob.escape(parent), f"{_PREFIX}*", _LOCK)):
        try:
            with open(path, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.remove_folder(os.path.dirname(path))
        except OSError:
            continue  # its run is alive, or it is somebody else's
