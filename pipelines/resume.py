# SPDX-License-Identifier: Apache-2.0
"""`--resume`: training on the sample of a run that failed after it had read.

When a sample is complete, a step notes in the run's folder what it is of. A run that fails after that leaves its
folder, and so does one that is killed.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from transforms import run_folder
from transforms.errors import RequestError
from transforms.files import is_local, read_whole, write_whole
from transforms.opensearch import OpenSearchVectors
from transforms.sampling import Sample
from transforms.spill import Spill
from transforms.vectors import SourceSummary, VectorSource

_NOTES = "sample-*.json"
#: What decides which vectors are sampled. Not how they are read: slices, page sizes and readers change nothing.
_DECISIVE = ("pattern", "column", "index", "field", "dimension", "data_type", "query", "seed")


@dataclass(frozen=True)
class KeptSample:
    """A sample that an earlier run drew.

    Attributes:
      folder: of that run.
      source: what it is of, see `identity`.
      model_ids: the models that the run was to train on it.
      summary: what the source said then.
      sample: references to the vectors.
    """

    folder: str
    source: Mapping[str, Any]
    model_ids: Sequence[str]
    summary: SourceSummary
    sample: Sample


def identity(source: VectorSource) -> dict[str, Any]:
    """What a sample is of: two sources with the same identity and count give the same sample."""
    found = {name: getattr(source, name) for name in _DECISIVE if hasattr(source, name)}
    if "pattern" in found and is_local(found["pattern"]):
        found["pattern"] = os.path.abspath(found["pattern"])
    if isinstance(source, OpenSearchVectors):
        found["url"] = source.connection.url
    return found


def note_path(folder: str, source: str) -> str:
    return posixpath.join(folder, _NOTES.replace("*", source))


def note(sample: Sample, path: str, source: Mapping[str, Any], summary: SourceSummary, ids: Sequence[str]) -> Sample:
    """Writes what `sample` is of to `path`, for `find`, and passes it on."""
    told = {"source": source, "model_ids": ids, "summary": asdict(summary), "sample": asdict(sample)}
    write_whole(path, json.dumps(told).encode())
    return sample


def find(temp_location: str | None) -> list[KeptSample]:
    """The complete samples that runs left in one place, the latest first."""
    found = []
    for path in run_folder.find(temp_location, _NOTES):
        with suppress(OSError, ValueError, KeyError, TypeError):  # another version's, or gone meanwhile
            found.append(_read(path))
    return found


def matching(kept: Sequence[KeptSample], sources: Sequence[VectorSource]) -> list[KeptSample | None]:
    """For each source its sample, all of one run: the latest that has any.

    Raises:
      RequestError: there is none.
    """
    wanted = [identity(source) for source in sources]
    for folder in dict.fromkeys(sample.folder for sample in kept):
        of_run = [sample for sample in kept if sample.folder == folder]
        found = [next((sample for sample in of_run if sample.source == each), None) for each in wanted]
        if any(found):
            return found
    raise RequestError(f"there is no sample to --resume with, of {json.dumps(wanted[0])}: run without it")


def has_sample(folder: str) -> bool:
    """Whether a run has come as far as to have a complete sample."""
    return run_folder.holds(folder, _NOTES)


def _read(path: str) -> KeptSample:
    told = json.loads(read_whole(path))
    sample = dict(told["sample"])
    spills = tuple(Spill(**spill) for spill in sample.pop("spills"))
    return KeptSample(
        posixpath.dirname(path),
        told["source"],
        told["model_ids"],
        SourceSummary(**told["summary"]),
        Sample(**sample, spills=spills),
    )
