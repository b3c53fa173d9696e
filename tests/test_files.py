# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from apache_beam.io.aws.clients.s3.messages import S3ClientError
from apache_beam.io.filesystem import BeamIOError

from transforms import files
from transforms.errors import RequestError, StorageError, TrainingError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (S3ClientError("Forbidden", 403), "Forbidden"),
        (BeamIOError("Match operation failed", {"s3://b/*": S3ClientError("Access Denied", 403)}), "Access Denied"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_filesystems_raise_is_one_error_with_the_path(error: Exception, told: str) -> None:
    with (
        pytest.raises(StorageError, match=f"^cannot write s3://b/x: {told}$") as caught,
        files.explained("write", "s3://b/x"),
    ):
        raise error
    assert isinstance(caught.value, TrainingError)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no"), BeamIOError("no", {"x": S3ClientError("Not Found", 404)})]
)
def test_what_is_not_there_is_told_apart(error: Exception) -> None:
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory: 's3://b/x'"),
        files.explained("read", "s3://b/x"),
    ):
        raise error


def test_a_path_that_no_filesystem_has() -> None:
    with pytest.raises(RequestError, match=r"^cannot use foo://x: Unable to get filesystem"):
        files.check("foo://x")
    with pytest.raises(RequestError, match=r"^cannot read foo://x: Unable to get filesystem"):
        files.read_whole("foo://x")


def test_join() -> None:
    assert files.join("/a/", "b", "c") == files.join("/a", "b", "c") == "/a/b/c"
    assert files.join("s3://b/a", "*") == "s3://b/a/*"


def test_match_and_remove(tmp_path: Path) -> None:
    assert files.match(f"{tmp_path}/none/*") == []
    for age, name in enumerate("cab"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert files.match(f"{tmp_path}/*") == [f"{tmp_path}/{name}" for name in "cab"]
    files.remove(f"{tmp_path}/c")
    files.remove(f"{tmp_path}/c")
    assert sorted(files.match(f"{tmp_path}/*")) == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_whole(f"{tmp_path}/none/x", b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=f"^cannot write {tmp_path}/folder: Is a directory$"):
        files.write_whole(f"{tmp_path}/folder", b"1")
    assert os.listdir(tmp_path) == ["folder"]
