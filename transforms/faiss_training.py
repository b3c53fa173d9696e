# SPDX-License-Identifier: Apache-2.0
"""From a request and a sample to the bytes of a trained faiss index, as the k-NN plugin itself would have stored them.

Knows no Beam and does no I/O. The steps are those of `TrainIndex` in the plugin's `jni/src/faiss_wrapper.cpp`; the
results are those of `faiss.Index.train`, bit for bit. What is done differently, none of it visible in a search:

* no polysemous permutation of the PQ codewords: nothing in OpenSearch uses it and it is over 95 % of the plugin's
  training time;
* the sub-quantizers of a PQ train side by side, one thread each, instead of one after another with all threads;
* cosine vectors are normalised before training, as the plugin does when it indexes and searches but not when it trains;
* where faiss was built for GPUs and sees some, they assign vectors to centroids in the k-means of an IVF. The centroids
  are then as good, but not the same bytes: sums are rounded in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np

from transforms import quantization
from transforms.codebooks import codec_of, read_index
from transforms.errors import TrainingError
from transforms.request import TrainingRequest

#: Called with a stage's name, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]

#: faiss draws the subset it trains an encoder on with this seed (IndexIVF::train through fvecs_maybe_subsample).
_FAISS_SEED = 1234


def _no_progress(stage: str, done: int, total: int) -> None:
    return None


def train(
    vectors: np.ndarray,
    request: TrainingRequest,
    threads: int,
    progress: Progress = _no_progress,
    niter: int | None = None,
    nredo: int | None = None,
    history: list[dict[str, float]] | None = None,
) -> bytes:
    """Trains the index that `request` describes.

    Args:
      vectors: (n, columns) float32, int8 (data_type byte) or packed uint8 (binary). Normalised in place for
        cosinesimil.
      request: a validated request.
      threads: OpenMP threads. Results are the same for any number on one machine with the same faiss build.
      progress: hears of k-means iterations and finished sub-quantizers.
      niter: iterations of each k-means, of the centroids and of the sub-quantizers. None for faiss's own numbers, which
        are the plugin's: 10 (`Level1Quantizer`) and 25 (`ClusteringParameters`).
      nredo: times that each k-means starts anew, of which the one with the smallest error counts; None for once.
      history: gets one entry for each iteration of the IVF's k-means, `objective` (mean squared distance to the
        centroid, or mean inner product with it) and `imbalance_factor`. A binary IVF does not tell.

    Returns:
      The serialised index: trained, empty, as `model_blob` of a model document.

    Raises:
      TrainingError: faiss refused, e.g. because there are fewer vectors than clusters.
    """
    faiss.omp_set_num_threads(threads)
    index = new_index(request)
    for clustering in _clusterings(index):
        clustering.niter, clustering.nredo = niter or clustering.niter, nredo or clustering.nredo
    try:
        if isinstance(index, faiss.IndexBinary):
            _train_binary(index, codes(vectors, request), progress)
            return faiss.serialize_index_binary(index).tobytes()
        vectors = prepare(vectors, request)
        if isinstance(index, faiss.IndexIVF):
            _train_ivf(index, vectors, threads, progress, history)
        else:
            _train_pq(codec_of(index).pq, vectors, threads, progress)
            codec_of(index).pq.compute_sdc_table()
            index.storage.is_trained = index.is_trained = True
        return faiss.serialize_index(index).tobytes()
    except RuntimeError as error:  # what SWIG makes of a FaissException
        raise TrainingError(f"faiss could not train {request.index_description}: {_reason(error)}") from error


def usable_gpus(request: TrainingRequest) -> int:
    """How many GPUs training `request` here would use: all that faiss sees, for an IVF that is not binary."""
    return faiss.get_num_gpus() if request.nlist is not None and not request.is_binary else 0


def new_index(request: TrainingRequest) -> faiss.Index | faiss.IndexBinary:
    """The untrained index, set up as the plugin sets it up before it trains."""
    description = request.index_description
    if request.is_binary:
        index = faiss.index_binary_factory(request.trained_dimension, description)
        index.make_direct_map()
        return index
    if request.code_size is not None:
        description += ("" if "x" in description.rpartition("PQ")[2] else "x8") + "np"
    metric = faiss.METRIC_INNER_PRODUCT if request.inner_product else faiss.METRIC_L2
    index = faiss.index_factory(request.trained_dimension, description, metric)
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = request.nprobes
        index.make_direct_map()
    else:
        # The factory gives HNSW,PQ the L2 metric whatever it was asked for.
        index.metric_type = index.storage.metric_type = metric
        index.hnsw.efConstruction = request.ef_construction
        index.hnsw.efSearch = request.ef_search
    return index


def prepare(vectors: np.ndarray, request: TrainingRequest) -> np.ndarray:
    """`vectors` as float32, to train a float index or search it with; normalised in place for cosinesimil."""
    matrix = np.ascontiguousarray(vectors, np.float32)
    if request.normalize:
        faiss.normalize_L2(matrix)
    return matrix


def codes(vectors: np.ndarray, request: TrainingRequest) -> np.ndarray:
    """(n, trained_dimension / 8) uint8: binary vectors as they are, float vectors as the `binary` encoder's bits."""
    if request.quantization_bits is None:
        return np.ascontiguousarray(vectors).view(np.uint8)
    matrix = prepare(vectors, request)
    return quantization.pack(matrix, quantization.thresholds(matrix, request.quantization_bits))


def check(blob: bytes, request: TrainingRequest, vectors: np.ndarray) -> None:
    """Reads a blob back as the plugin will and proves that it is what `request` asked for.

    Args:
      vectors: (n, columns) of the sample's dtype, a handful; they are added and searched for.

    Raises:
      TrainingError: naming what differs.
    """
    index, wanted = read_index(blob), new_index(request)
    for name, found, expected in _properties(index, wanted, request):
        if found != expected:
            raise TrainingError(f"the trained model has {name} {found}, expected {expected}")
    if isinstance(index, faiss.IndexBinary):
        again, queries = faiss.serialize_index_binary(index), codes(vectors.copy(), request)
    else:
        again, queries = faiss.serialize_index(index), prepare(vectors.copy(), request)
    if again.tobytes() != blob:
        raise TrainingError("the trained model does not serialise to the bytes it was read from")
    if not len(queries):
        return
    index.add(queries)
    if isinstance(index, (faiss.IndexIVF, faiss.IndexBinaryIVF)):
        index.nprobe = request.nlist
    distances, ids = index.search(queries, 1)
    if (ids < 0).any() or not np.isfinite(distances.astype(np.float64)).all():
        raise TrainingError("the trained model does not find the vectors that were added to it")


def _properties(index: faiss.Index, wanted: faiss.Index, request: TrainingRequest) -> list[tuple[str, object, object]]:
    pairs = [
        ("class", type(index).__name__, type(wanted).__name__),
        ("dimension", index.d, request.trained_dimension),
        ("metric", index.metric_type, wanted.metric_type),
        ("ntotal", index.ntotal, 0),
        ("is_trained", bool(index.is_trained), True),
    ]
    if type(index) is not type(wanted):
        return pairs
    if request.nlist is not None:
        quantizer = index.quantizer
        pairs += [("nlist", index.nlist, request.nlist), ("centroids", quantizer.ntotal, request.nlist)]
        pairs += [("nprobes", index.nprobe, wanted.nprobe)]
    if request.code_size is not None:
        pq = codec_of(index).pq
        pairs += [("PQ m", pq.M, request.pq_m), ("PQ code_size", pq.nbits, request.code_size)]
        finite = np.isfinite(faiss.vector_to_array(pq.centroids)).all()
        pairs += [("finite codewords", bool(finite), True)]
    return pairs


def _clusterings(index: faiss.Index | faiss.IndexBinary) -> Iterator[faiss.ClusteringParameters]:
    """The parameters of each k-means that training the index runs."""
    if isinstance(index, (faiss.IndexIVF, faiss.IndexBinaryIVF)):
        yield index.cp
    if isinstance(index, faiss.IndexIVFPQ):
        yield index.pq.cp
    if isinstance(index, faiss.IndexHNSW):
        yield codec_of(index).pq.cp


def _train_ivf(
    index: faiss.IndexIVF,
    vectors: np.ndarray,
    threads: int,
    progress: Progress,
    history: list[dict[str, float]] | None,
) -> None:
    clustering = faiss.Clustering(index.d, index.nlist, index.cp)
    index.quantizer.reset()
    if faiss.get_num_gpus():
        _cluster(clustering, vectors, faiss.index_cpu_to_all_gpus(index.quantizer), progress)
        index.quantizer.add(faiss.vector_to_array(clustering.centroids).reshape(index.nlist, index.d))
    else:
        _cluster(clustering, vectors, index.quantizer, progress)
    if history is not None:
        used = min(len(vectors), index.cp.max_points_per_centroid * index.nlist)
        # The last of them are those of the restart that counts; those before it were worse.
        done = clustering.iteration_stats.size()
        for number in range(max(0, done - clustering.niter), done):
            step = clustering.iteration_stats.at(number)
            history.append({"objective": step.obj / used, "imbalance_factor": step.imbalance_factor})
    index.quantizer.is_trained = True
    if isinstance(index, faiss.IndexIVFPQ):
        _train_pq(index.pq, _residuals(index, vectors), threads, progress)
    # Not through index.train: for an IVF-PQ it would end by filling a search table of nlist x m x 2**code_size floats,
    # and for a scalar quantizer it would compute 100 000 residuals although fp16 and bytes have nothing to learn.
    index.is_trained = True


def _residuals(index: faiss.IndexIVFPQ, vectors: np.ndarray) -> np.ndarray:
    """What is left of each vector of faiss's own subset after its centroid is taken away."""
    wanted = index.train_encoder_num_vectors()
    if wanted < len(vectors):
        permutation = np.empty(len(vectors), np.int32)
        faiss.rand_perm(faiss.swig_ptr(permutation), len(vectors), _FAISS_SEED)
        vectors = vectors[permutation[:wanted]]
    assigned = index.quantizer.search(vectors, 1)[1].ravel()
    residuals = np.empty_like(vectors)
    index.quantizer.compute_residual_n(
        len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(residuals), faiss.swig_ptr(assigned)
    )
    return residuals


def _train_pq(pq: faiss.ProductQuantizer, vectors: np.ndarray, threads: int, progress: Progress) -> None:
    centroids = np.empty((pq.M, pq.ksub, pq.dsub), np.float32)
    finished = 0
    lock = threading.Lock()

    def one(m: int) -> None:
        nonlocal finished
        faiss.omp_set_num_threads(1)  # of this Python thread only
        clustering = faiss.Clustering(pq.dsub, pq.ksub, pq.cp)
        part = np.ascontiguousarray(vectors[:, m * pq.dsub : (m + 1) * pq.dsub])
        clustering.train(part, faiss.IndexFlatL2(pq.dsub))
        centroids[m] = faiss.vector_to_array(clustering.centroids).reshape(pq.ksub, pq.dsub)
        with lock:
            finished += 1
            progress("sub-quantizers", finished, pq.M)

    with ThreadPoolExecutor(min(threads, pq.M)) as pool:
        list(pool.map(one, range(pq.M)))
    faiss.copy_array_to_vector(centroids.ravel(), pq.centroids)


def _train_binary(index: faiss.IndexBinaryIVF, codes: np.ndarray, progress: Progress) -> None:
    total = index.cp.niter * index.cp.nredo
    progress("k-means", 0, total)
    index.train(codes)
    progress("k-means", total, total)


def _cluster(clustering: faiss.Clustering, vectors: np.ndarray, index: faiss.Index, progress: Progress) -> None:
    """`clustering.train`, while a thread watches the number of finished iterations."""
    finished = threading.Event()
    total = clustering.niter * clustering.nredo

    def watch() -> None:
        seen = -1
        while not finished.wait(0.1):
            # faiss may be growing the vector this very moment; only its length is looked at, and held to what is
            # possible.
            done = min(clustering.iteration_stats.size(), total)
            if done != seen:
                progress("k-means", done, total)
                seen = done

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        clustering.train(vectors, index)
    finally:
        finished.set()
        watcher.join()
    progress("k-means", total, total)


def _reason(error: RuntimeError) -> str:
    """The sentence inside a FaissException, without the C++ signature and file before it."""
    text = str(error)
    for mark in ("failed: ", "Error: "):
        if mark in text:
            text = text.rpartition(mark)[2]
    return " ".join(text.split())
