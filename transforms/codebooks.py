# SPDX-License-Identifier: Apache-2.0
"""What a model knows: the centroids and codewords inside a blob, taken out, compared, and laid out as training vectors.

Pure faiss and numpy; no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np

from transforms.errors import RequestError, TrainingError


@dataclass(frozen=True, eq=False)
class Codebooks:
    """The trained part of a faiss index.

    Attributes:
      kind: the faiss class, e.g. `IndexIVFPQ`.
      dimension: of the index; bits for a binary index.
      metric: `l2` or `innerproduct`; `hamming` for a binary index.
      coarse: (nlist, dimension) float32 or (nlist, dimension / 8) uint8 centroids of an IVF, else None.
      codewords: (m, 2^code_size, dimension / m) float32 codewords of a PQ, else None.
    """

    kind: str
    dimension: int
    metric: str
    coarse: np.ndarray | None
    codewords: np.ndarray | None

    @classmethod
    def of(cls, blob: bytes) -> Codebooks:
        """The codebooks of a serialised IVF, HNSW-PQ or binary IVF index. Raises TrainingError for anything else."""
        index = read_index(blob)
        return cls._of_binary(index) if isinstance(index, faiss.IndexBinary) else cls._of_float(index)

    @classmethod
    def _of_binary(cls, index: faiss.IndexBinary) -> Codebooks:
        if not isinstance(index, faiss.IndexBinaryIVF):
            raise TrainingError(f"the blob holds a faiss {type(index).__name__}, which no k-NN model is")
        flat = faiss.downcast_IndexBinary(index.quantizer)
        coarse = faiss.vector_to_array(flat.xb).reshape(index.nlist, index.d // 8)
        return cls(type(index).__name__, index.d, "hamming", coarse, None)

    @classmethod
    def _of_float(cls, index: faiss.Index) -> Codebooks:
        metric = "innerproduct" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        coarse = pq = None
        if isinstance(index, faiss.IndexIVF):
            coarse = index.quantizer.reconstruct_n(0, index.nlist)
            pq = index.pq if isinstance(index, faiss.IndexIVFPQ) else None
        elif isinstance(index, faiss.IndexHNSWPQ):
            pq = codec_of(index).pq
        else:
            raise TrainingError(f"the blob holds a faiss {type(index).__name__}, which no k-NN model is")
        codewords = None
        if pq is not None:
            codewords = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        return cls(type(index).__name__, index.d, metric, coarse, codewords)

    def replay_vectors(self, data_type: str) -> np.ndarray:
        """The training set that k-means only has to copy to arrive at these codebooks: one vector for each cluster.

        faiss copies the training set when there are as many points as clusters (`faiss/Clustering.cpp`). For an IVF
        these are its centroids, rounded to whole numbers for byte vectors; for a PQ under HNSW row j is codeword j of
        every sub-space, side by side.

        Returns:
          (nlist, columns) or (256, dimension), float32, int8 or packed uint8.

        Raises:
          RequestError: for an IVF-PQ, whose codewords are trained on what the centroids leave over: nothing, here.
        """
        if self.coarse is not None and self.codewords is not None:
            raise RequestError(
                "an IVF-PQ cannot be replayed: its codewords are trained on residuals, which would be zero"
            )
        if self.codewords is not None:
            return np.ascontiguousarray(self.codewords.transpose(1, 0, 2)).reshape(self.codewords.shape[1], -1)
        assert self.coarse is not None  # `of` makes no codebooks without either
        return round_to_bytes(self.coarse) if data_type == "byte" else self.coarse


def round_to_bytes(vectors: np.ndarray) -> np.ndarray:
    """(n, d) float32 as the nearest int8."""
    return np.clip(np.rint(vectors), -128, 127).astype(np.int8)


def difference(wanted: Codebooks, found: Codebooks) -> str | None:
    """Why two models do not find the same neighbours, in words, or None when they do.

    Values are compared bit by bit, their order is not: which number a centroid or a codeword has changes no distance.
    """
    for name in ("kind", "dimension", "metric"):
        if getattr(wanted, name) != getattr(found, name):
            return f"{name} {getattr(found, name)}, expected {getattr(wanted, name)}"
    for name, one, two in _parts(wanted, found):
        if one.shape != two.shape:
            return f"{name} of shape {two.shape}, expected {one.shape}"
        different = len(one) - _rows_in_common(one, two)
        if different:
            return f"{different} of {len(one)} {name} differ"
    return None


def distances(one: Codebooks, two: Codebooks) -> dict[str, float]:
    """How far apart the centroids and the codewords of two models are: mean distance of one's to the nearest of `two`.

    Euclidean, as a share of the mean norm of `one`'s rows; for binary centroids the share of the bits that differ.
    """
    found: dict[str, list[float]] = {}
    for name, left, right in _parts(one, two):
        if left.shape[1] != right.shape[1]:
            continue
        if left.dtype == np.uint8:
            left, right = (np.unpackbits(bits, axis=1).astype(np.float32) for bits in (left, right))
            distance = float((_nearest(left, right) ** 2).mean()) / left.shape[1]
        else:
            distance = float(_nearest(left, right).mean()) / (float(np.linalg.norm(left, axis=1).mean()) or 1.0)
        found.setdefault(name.partition(" of ")[0], []).append(distance)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _nearest(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n,) distance of each row of `left` to the nearest row of `right`."""
    index = faiss.IndexFlatL2(left.shape[1])
    index.add(np.ascontiguousarray(right))
    nearest = right[index.search(np.ascontiguousarray(left), 1)[1][:, 0]]
    return np.linalg.norm(left - nearest, axis=1)  # faiss's own distances are not exact


def _parts(one: Codebooks, two: Codebooks) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The matrices that both models have: centroids, then the codewords of each sub-quantizer."""
    parts = []
    if one.coarse is not None and two.coarse is not None:
        parts.append(("centroids", one.coarse, two.coarse))
    if one.codewords is not None and two.codewords is not None:
        if len(one.codewords) != len(two.codewords):
            return [*parts, ("sub-quantizers", one.codewords[:, 0], two.codewords[:, 0])]
        pairs = zip(one.codewords, two.codewords, strict=True)
        parts += [(f"codewords of sub-quantizer {number}", left, right) for number, (left, right) in enumerate(pairs)]
    return parts


def _rows_in_common(one: np.ndarray, two: np.ndarray) -> int:
    """How many rows of two matrices of the same shape and type can be paired with an equal one."""
    left, right = (_sorted_rows(matrix) for matrix in (one, two))
    if (left == right).all():
        return len(one)
    rows, counts = np.unique(left, return_counts=True)
    others, other_counts = np.unique(right, return_counts=True)
    _, at, other_at = np.intersect1d(rows, others, assume_unique=True, return_indices=True)
    return int(np.minimum(counts[at], other_counts[other_at]).sum())


def _sorted_rows(matrix: np.ndarray) -> np.ndarray:
    """The rows of a matrix as sorted byte strings."""
    rows = np.ascontiguousarray(matrix)
    return np.sort(rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel())


def read_index(blob: bytes) -> faiss.Index | faiss.IndexBinary:
    """The faiss index in a blob, without the search table of an IVF-PQ, which is far larger than the model.

    Raises TrainingError if it is none.
    """
    data = np.frombuffer(blob, np.uint8)
    if blob[:2] == b"IB":  # every binary index of faiss begins so
        return _read(faiss.deserialize_index_binary, data)
    return _read(_deserialize, data)


def codec_of(index: faiss.Index) -> faiss.IndexIVF | faiss.IndexPQ:
    """What holds the codes: an IVF itself, what is under the graph of an HNSW."""
    return index if isinstance(index, faiss.IndexIVF) else faiss.downcast_index(index.storage)


def _deserialize(data: np.ndarray) -> faiss.Index:
    reader = faiss.VectorIOReader()
    faiss.copy_array_to_vector(data, reader.data)
    return faiss.read_index(reader, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)


def _read(reader: object, data: np.ndarray) -> faiss.Index | faiss.IndexBinary:
    try:
        return reader(data)  # type: ignore[operator]
    except RuntimeError as error:
        raise TrainingError(f"the blob is not a faiss index: {' '.join(str(error).split())[-200:]}") from None
