# SPDX-License-Identifier: Apache-2.0
"""Files on any Beam filesystem. Beam is imported for remote paths only, so that a process without it starts fast."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any, BinaryIO


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
