# SPDX-License-Identifier: Apache-2.0
"""The temporary folder of one run: made when it starts, gone when it ends, unless it is kept for another to resume.

A local folder holds a lock for as long as its run lives, so the folder of a run that was killed is told apart, and is
removed by the next run in the same place. Object stores have no locks: nothing is swept up there.
"""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from transforms import files
from transforms.errors import RequestError

_PREFIX = "knn-train-"
_LOCK = "owner.lock"
_KEPT = "kept"
#: Seconds for which the next runs in the same place leave alone what was kept.
KEPT_S = 24 * 3600.0


@dataclass
class RunFolder:
    """A run's folder.

    Attributes:
      path: on any Beam filesystem.
      keep: set it to leave the folder when the run ends, for another to resume.
      goes_on: set it where the run goes on elsewhere: the folder stays, and no other run may have it.
    """

    path: str
    keep: bool = False
    goes_on: bool = False


def check(temp_location: str | None) -> None:
    """Raises RequestError if no run's folder can be made there."""
    parent = _parent(temp_location)
    if not files.is_local(parent):
        files.check(parent)
        return
    while not os.path.exists(parent):
        parent = os.path.dirname(os.path.abspath(parent))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"temp_location is {temp_location!r}, but {parent} is no folder that this user may write to")


@contextmanager
def create(temp_location: str | None) -> Iterator[RunFolder]:
    """A new folder under `temp_location`, on any Beam filesystem; under the system's temporary folder if None."""
    parent = _parent(temp_location)
    if files.is_local(parent):
        with files.explained("write", parent):
            os.makedirs(parent, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(parent), f"{_PREFIX}*", "")):
            _sweep(path)
        # Under another name until it is locked: a run that starts this moment must not take it for a dead run's.
        new = tempfile.mkdtemp(prefix=f".new-{_PREFIX}", dir=parent)
        path = os.path.join(parent, _PREFIX + os.path.basename(new).removeprefix(f".new-{_PREFIX}"))
        with open(os.path.join(new, _LOCK), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(new, path)
            with _removed_at_the_end(path) as folder:
                yield folder
    else:
        with _removed_at_the_end(files.join(parent, _PREFIX + uuid.uuid4().hex)) as folder:
            yield folder


@contextmanager
def reopen(path: str) -> Iterator[RunFolder]:
    """The folder of a run that has ended. Raises RequestError if its run is still alive."""
    if files.is_local(path):
        with open(os.path.join(path, _LOCK), "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RequestError(f"the run of {path} is still alive") from None
            with suppress(FileNotFoundError):
                os.remove(os.path.join(path, _KEPT))
            with _removed_at_the_end(path) as folder:
                yield folder
    else:
        files.remove(files.join(path, _KEPT))
        with _removed_at_the_end(path) as folder:
            yield folder


def find(temp_location: str | None, name: str) -> list[str]:
    """Paths of the files that match `name` (a glob) in the folders of ended runs in one place, the latest first.

    On object stores those of runs that are alive are among them.
    """
    found = files.match(files.join(_parent(temp_location), f"{_PREFIX}*", name))
    return [path for path in found if not _is_alive(os.path.dirname(path))]


def holds(folder: str, name: str) -> bool:
    """Whether a folder has a file that matches `name`, a glob."""
    return bool(files.match(files.join(folder, name)))


def discard(path: str) -> None:
    """Removes the folder of a run that has ended, also one that was kept. On object stores only that: whatever else
    is there may be a run's that is alive.
    """
    if not files.is_local(path) and not holds(path, _KEPT):
        return
    with suppress(RequestError, OSError), reopen(path):
        pass


def _is_alive(folder: str) -> bool:
    if not files.is_local(folder):
        return False
    try:
        with open(os.path.join(folder, _LOCK), "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True  # or somebody else's
    return False


def _parent(temp_location: str | None) -> str:
    return temp_location or tempfile.gettempdir()


@contextmanager
def _removed_at_the_end(path: str) -> Iterator[RunFolder]:
    folder = RunFolder(path)
    try:
        yield folder
    finally:
        if not folder.keep and not folder.goes_on:
            files.remove_folder(path)
        elif not folder.goes_on:
            files.write_whole(files.join(path, _KEPT), b"kept")  # Beam's object stores make no empty files


def _sweep(path: str) -> None:
    try:
        if time.time() - os.path.getmtime(os.path.join(path, _KEPT)) < KEPT_S:
            return
    except OSError:
        pass  # not kept
    discard(path)
