# SPDX-License-Identifier: Apache-2.0
"""Files on any Beam filesystem. Beam is imported for remote paths only, so that a process without it starts fast.

What is not there raises FileNotFoundError, a path that no filesystem here can have RequestError. Whatever else
filesystems raise, each in its own way, becomes StorageError.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from transforms.errors import RequestError, StorageError


def is_local(path: str) -> bool:
    return "://" not in path


def join(folder: str, *names: str) -> str:
    """A path below `folder`."""
    return "/".join([folder.rstrip("/") if folder.strip("/") else folder, *names])


@contextmanager
def explained(what: str, path: str) -> Iterator[None]:
    """Raises what goes wrong inside as the errors of this module; `what` is a verb, as "read"."""
    try:
        yield
    except (RequestError, StorageError):
        raise
    except Exception as error:
        # Beam raises BeamIOError with the errors of several paths, and what its clients raise, some without a message.
        details = getattr(error, "exception_details", None)
        cause = next(iter(details.values()), error) if isinstance(details, dict) else error
        if getattr(cause, "errno", None) == errno.ENOENT or getattr(cause, "code", None) == 404:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        told = getattr(cause, "strerror", None) or getattr(cause, "message", None) or str(cause) or type(cause).__name__
        if isinstance(cause, ValueError) and "filesystem" in told:
            raise RequestError(f"cannot {what} {path}: {told}") from error
        raise StorageError(f"cannot {what} {path}: {told}") from error


def check(path: str) -> None:
    """Refuses what cannot be reached from here, before any work. Raises RequestError."""
    if is_local(path):
        return
    from apache_beam.io.filesystems import FileSystems

    try:
        with explained("use", path):
            FileSystems.get_filesystem(path)
    except StorageError as error:
        raise RequestError(str(error)) from None
    if path.startswith("s3://") and "s3_access_key_id" not in remote_options():
        try:
            import boto3  # type: ignore[import-untyped]
        except ImportError:
            raise RequestError(f"cannot use {path}: it takes boto3, pip install 'opensearch-knn-train[aws]'") from None
        if boto3.Session().get_credentials() is None:  # Beam would ask for them again for eight minutes
            raise RequestError(f"cannot use {path}: there are no credentials for S3, as in AWS_ACCESS_KEY_ID")


def open_file(path: str, mode: str) -> BinaryIO:
    """Opens `path` to read ('rb') or to write ('wb')."""
    with explained("read" if mode == "rb" else "write", path):
        if is_local(path):
            return open(path, mode)  # type: ignore[return-value]
        from apache_beam.io.filesystems import CompressionTypes, FileSystems

        opener = FileSystems.open if mode == "rb" else FileSystems.create
        return opener(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_whole(path: str) -> bytes:
    with open_file(path, "rb") as file, explained("read", path):
        return file.read()


def write_whole(path: str, data: bytes) -> None:
    """Writes a file that nobody sees a part of: object stores show whole ones, local files are renamed into place."""
    if not is_local(path):
        with explained("write", path), open_file(path, "wb") as file:
            file.write(data)
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        with explained("write", path):
            with open(part, "wb") as local:
                local.write(data)
                local.flush()
                os.fsync(local.fileno())
            os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def match(pattern: str) -> list[str]:
    """The files of a glob, those written last first."""
    from apache_beam.io.filesystems import FileSystems

    with explained("list", pattern):
        found = list(FileSystems.match([pattern])[0].metadata_list)
    return [entry.path for entry in sorted(found, key=lambda entry: -entry.last_updated_in_seconds)]


def remove(path: str) -> None:
    """Removes a file. It need not be there."""
    with suppress(FileNotFoundError), explained("remove", path):
        if is_local(path):
            os.remove(path)
            return
        from apache_beam.io.filesystems import FileSystems

        FileSystems.delete([path])


def remove_folder(folder: str) -> None:
    """Removes the files in `folder`, and a local folder itself; object stores have none. It need not be there."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    from apache_beam.io.filesystems import FileSystems

    found = match(join(folder, "*"))
    if found:
        with explained("remove", folder):
            FileSystems.delete(found)


def remote_options() -> dict[str, Any]:
    """What Beam's filesystems were set up with in this process: the endpoint of an S3, say. It may hold secrets."""
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options import pipeline_options as beams

    options = FileSystems._pipeline_options  # Beam sets it wherever steps run, and has no other way to ask
    if options is None:
        return {}
    parser = beams._BeamArgumentParser()
    for kind in (beams.S3Options, beams.AzureOptions, beams.HadoopFileSystemOptions, beams.GoogleCloudOptions):
        kind._add_argparse_args(parser)
    names = {action.dest for action in parser._actions}
    return {name: value for name, value in options.get_all_options(drop_default=True).items() if name in names}


def set_remote_options(options: Mapping[str, Any]) -> None:
    """Sets up Beam's filesystems as `remote_options` says; without, some do not even start."""
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    FileSystems.set_options(PipelineOptions.from_dictionary(dict(options)))
