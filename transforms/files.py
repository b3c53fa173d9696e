# SPDX-License-Identifier: Apache-2.0
"""Files on any Beam filesystem. Beam is imported for remote paths only, so that a process without it starts fast."""

from __future__ import annotations

import os
import shutil
from typing import BinaryIO


def is_local(path: str) -> bool:
    return "://" not in path


def open_file(path: str, mode: str) -> BinaryIO:
    """Opens `path` to read ('rb') or to write ('wb')."""
    if is_local(path):
        return open(path, mode)  # type: ignore[return-value]
    from apache_beam.io.filesystems import CompressionTypes, FileSystems

    opener = FileSystems.open if mode == "rb" else FileSystems.create
    return opener(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_whole(path: str) -> bytes:
    with open_file(path, "rb") as file:
        return file.read()


def write_whole(path: str, data: bytes) -> None:
    """Writes a file that nobody sees a part of: object stores show whole ones, local files are renamed into place."""
    if not is_local(path):
        with open_file(path, "wb") as file:
            file.write(data)
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as local:
            local.write(data)
            local.flush()
            os.fsync(local.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def remove_folder(folder: str) -> None:
    """Removes the files in `folder`, and a local folder itself; object stores have none. It need not be there."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    from apache_beam.io.filesystems import FileSystems

    found = [entry.path for entry in FileSystems.match([f"{folder.rstrip('/')}/*"])[0].metadata_list]
    if found:
        FileSystems.delete(found)
