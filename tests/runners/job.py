# SPDX-License-Identifier: Apache-2.0
"""One training run that every runner is given, and what must come out of it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, DIMENSION, FILES, SAMPLE = 40_000, 32, 4, 10_000

REQUEST = {
    "training_index": "vectors",
    "training_field": "vector",
    "dimension": DIMENSION,
    "max_training_vector_count": SAMPLE,
    "method": {
        "name": "ivf",
        "engine": "faiss",
        "space_type": "l2",
        "parameters": {"nlist": 16, "encoder": {"name": "pq", "parameters": {"m": 8, "code_size": 6}}},
    },
}


def vectors() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((ROWS, DIMENSION)).astype(np.float32)


def write_export(folder: Path, matrix: np.ndarray) -> str:
    """`FILES` Parquet files of some row groups each; returns their pattern."""
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(matrix, FILES)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), DIMENSION)
        pq.write_table(pa.table({"vector": column}), folder / f"{number}.parquet", row_group_size=2_500)
    return f"{folder}/*.parquet"


@dataclass(frozen=True)
class Run:
    """How a run of `knn-train` ended. `blob_sha256` is of the file itself, "" if there is none."""

    code: int
    output: str
    errors: str
    blob_bytes: int
    blob_sha256: str
    seconds: float

    def checked(self) -> Run:
        assert self.code == 0, self.errors[-4000:]
        assert self.output.startswith('{"model_id": "model"}\n'), self.output
        assert self.blob_sha256
        return self


@dataclass(frozen=True)
class Job:
    """A run of `knn-train` that has begun in the folder `work`."""

    work: Path
    process: subprocess.Popen[str]
    start: float

    def wait(self) -> Run:
        """Its end, for which it has 5 minutes."""
        try:
            output, errors = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        seconds = time.monotonic() - self.start
        kept = re.findall(r"^the sample is kept in (\S+):", errors, re.MULTILINE)
        assert [str(path) for path in (self.work / "temp").iterdir()] == kept, "temporary files are left"
        path = self.work / "models" / "model" / "model.faiss"
        blob = path.read_bytes() if path.exists() else b""
        digest = hashlib.sha256(blob).hexdigest() if blob else ""
        return Run(self.process.returncode, output, errors, len(blob), digest, seconds)


def start_knn_train(work: Path, *flags: str) -> Job:
    """Begins to train `REQUEST` with `flags` in a folder of its own."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "temp").mkdir(exist_ok=True)
    (work / "request.json").write_text(json.dumps(REQUEST))
    command = [sys.executable, "-m", "pipelines.train", "--request", f"{work}/request.json", "--model_id", "model"]
    command += ["--model_dir", f"{work}/models", "--temp_location", f"{work}/temp", "--seed", "5", *flags]
    start = time.monotonic()
    return Job(work, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), start)


def knn_train(work: Path, *flags: str) -> Run:
    return start_knn_train(work, *flags).wait()
