# SPDX-License-Identifier: Apache-2.0
"""Stands in for the arithmetic of the k-NN plugin's native library, so that `_train` runs in a test cluster.

The library is not published with the plugin. `knn_bridge.c`, compiled at test time, takes its place in the node and
sends what the plugin wants trained to a `BridgeTrainer` in the test process, which trains it with faiss-cpu in the
order the library does. Everything else `_train` does is the plugin's own code.
"""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from tests.opensearch_home import Missing

SOURCE = Path(__file__).with_name("knn_bridge.c")
# One file under each name the plugin asks for where the processor-specific variants are switched off (SETTINGS).
LIBRARIES = ("opensearchknn_common", "opensearchknn_faiss", "opensearchknn_simd")
SETTINGS = {f"knn.faiss.{variant}.disabled": True for variant in ("avx2", "avx512", "avx512_spr")}


def compile_bridge(folder: Path, java_homes: list[Path]) -> None:
    """Puts the libraries into `folder`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Missing("cc (a C compiler) is not on PATH")
    headers = next((home / "include" for home in java_homes if (home / "include" / "jni.h").is_file()), None)
    if headers is None:
        raise Missing("no JDK here has include/jni.h")
    folder.mkdir()
    first, *others = (folder / f"lib{name}.so" for name in LIBRARIES)
    include = [f"-I{headers}", f"-I{headers / 'linux'}"]
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", *include, "-o", str(first), str(SOURCE)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    for path in others:
        shutil.copy(first, path)


@dataclass(frozen=True)
class BridgeTraining:
    """One training the plugin asked for, and what became of it."""

    kind: str  # float, byte or binary
    dimension: int
    parameters: dict[str, Any]
    vectors: np.ndarray
    blob: bytes | None
    error: str | None


class BridgeTrainer:
    """Answers the bridge of one node. `trainings` are the latest it was asked for, oldest first."""

    def __init__(self) -> None:
        self.trainings: deque[BridgeTraining] = deque(maxlen=16)
        self._may_train = threading.Event()
        self._may_train.set()
        self._server = _Listener(("127.0.0.1", 0), _Connection)
        self._server.trainer = self
        threading.Thread(target=self._server.serve_forever, name="knn-bridge", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @contextmanager
    def held(self) -> Iterator[None]:
        """No training finishes inside this block: a model the cluster trains meanwhile stays in state `training`."""
        self._may_train.clear()
        try:
            yield
        finally:
            self._may_train.set()

    def close(self) -> None:
        self._may_train.set()
        self._server.shutdown()
        self._server.server_close()

    def train(self, kind: str, dimension: int, parameters: dict[str, Any], raw: bytes) -> BridgeTraining:
        self._may_train.wait()
        blob, error = None, None
        vectors = _as_rows(kind, dimension, raw)
        try:
            # OpenMP keeps this number for the calling thread alone.
            faiss.omp_set_num_threads(int(parameters.get("indexThreadQty", 1)))
            blob = train_as_the_plugin(kind, dimension, parameters, vectors)
        except Exception as problem:  # whatever it is, it belongs into the model's state
            error = str(problem)
        training = BridgeTraining(kind, dimension, parameters, vectors, blob, error)
        self.trainings.append(training)
        return training


def _as_rows(kind: str, dimension: int, raw: bytes) -> np.ndarray:
    dtype, width = {"float": ("f4", dimension), "byte": ("i1", dimension), "binary": ("u1", dimension // 8)}[kind]
    return np.frombuffer(raw, dtype=dtype).reshape(-1, width)


def train_as_the_plugin(kind: str, dimension: int, parameters: dict[str, Any], vectors: np.ndarray) -> bytes:
    """The serialised index that the native library returns for these arguments.

    One thing differs: a product quantizer is trained without the polysemous permutation. It takes most of the time
    there, nothing in the plugin uses it, and the layout of the bytes is the same.
    """
    description = re.sub(r"PQ\d+(x\d+)?$", r"\g<0>np", parameters["index_description"])
    if kind == "binary":
        binary = faiss.index_binary_factory(dimension, description)
        if isinstance(binary, faiss.IndexBinaryIVF):
            binary.make_direct_map()
        if not binary.is_trained:
            binary.train(vectors)
        return bytes(faiss.serialize_index_binary(binary))
    metric = faiss.METRIC_L2 if parameters["spaceType"] in ("l2", "hamming") else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(dimension, description, metric)
    index.metric_type = metric
    if isinstance(index, faiss.IndexHNSWPQ):
        index.storage.metric_type = metric
    _set_parameters(index, parameters.get("parameters", {}))
    if not index.is_trained:
        _train(index, vectors.astype(np.float32))
    return bytes(faiss.serialize_index(index))


def _set_parameters(index: faiss.Index, parameters: dict[str, Any]) -> None:
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = parameters.get("nprobes", index.nprobe)
        _set_parameters(faiss.downcast_index(index.quantizer), parameters.get("coarse_quantizer", {}))
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = parameters.get("ef_construction", index.hnsw.efConstruction)
        index.hnsw.efSearch = parameters.get("ef_search", index.hnsw.efSearch)


def _train(index: faiss.Index, vectors: np.ndarray) -> None:
    if isinstance(index, faiss.IndexIVF):
        if index.quantizer_trains_alone == 2:
            _train(faiss.downcast_index(index.quantizer), vectors)
        index.make_direct_map()
    if not index.is_trained:
        index.train(vectors)


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    trainer: BridgeTrainer


class _Connection(socketserver.StreamRequestHandler):
    server: _Listener

    def handle(self) -> None:
        kind, *numbers = self.rfile.readline().decode().split()
        dimension, text_size, vectors_size = map(int, numbers)
        parameters = json.loads(self.rfile.read(text_size))
        done = self.server.trainer.train(kind, dimension, parameters, self.rfile.read(vectors_size))
        state, answer = ("trained", done.blob) if done.blob is not None else ("failed", str(done.error).encode())
        self.wfile.write(f"{state} {len(answer)}\n".encode() + answer)
