# SPDX-License-Identifier: Apache-2.0
"""The temporary folder of one run: made when it starts, gone when it ends, and swept up later if it was killed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from apache_beam.io.filesystems import FileSystems

_PREFIX = "knn-train-"
_LOCK = "owner.lock"


@contextmanager
def create(temp_location: str | None) -> Iterator[str]:
    """A new folder under `temp_location`, on any Beam filesystem; under the system's temporary folder if None.

    A local folder holds a lock for as long as its run lives, so the folder of a run that was killed is told apart,
    and is removed by the next run in the same place.
    """
    parent = temp_location or tempfile.gettempdir()
    if "://" in parent:
        folder = FileSystems.join(parent, _PREFIX + uuid.uuid4().hex)
        try:
            yield folder
        finally:
            if FileSystems.exists(folder):
                FileSystems.delete([folder])
        return
    os.makedirs(parent, exist_ok=True)
    _sweep(parent)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    try:
        with open(os.path.join(folder, _LOCK), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: str) -> None:
    for path in glob.glob(os.path.join(glob.escape(parent), f"{_PREFIX}*", _LOCK)):
        try:
            with open(path, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)
        except OSError:
            continue  # its run is alive, or it is somebody else's
