# SPDX-License-Identifier: Apache-2.0
"""The three routes by which a model gets into a cluster, and which of them a model, a user and a sample allow.

All begin with the plugin's own `_train` on a temporary index, because nothing else registers a model:

* replay: the index holds our codebooks, a vector each, and k-means copies them. Public API only. Not for IVF-PQ.
* swap: `_train` on little more than nothing registers the model, then the blob in its document is replaced by ours.
  For every method, exact to the byte, but the document is in a system index.
* delegate: the index holds our sample and the cluster trains on it. Its codebooks, not ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transforms import faiss_training
from transforms.codebooks import Codebooks
from transforms.errors import RequestError
from transforms.request import TrainingRequest

REPLAY, SWAP, DELEGATE, AUTO = "replay", "swap", "delegate", "auto"
ROUTES = (AUTO, REPLAY, SWAP, DELEGATE)

EXACT, ROUNDED = "exact", "rounded"

#: Why a user cannot swap.
NO_WRITE = (
    "this user may not write to .opensearch-knn-models, a system index "
    "(that takes the admin certificate, or the permission system:admin/system_index where the cluster has it enabled)"
)
NO_SIGHT = (
    "this user may not see registrations, which are checked before a blob is replaced "
    "(that takes the permission cluster:monitor/state)"
)


@dataclass(frozen=True)
class Choice:
    """A route and, in a sentence, why."""

    route: str
    explanation: str


def replay_fidelity(request: TrainingRequest) -> tuple[str | None, str]:
    """What a replay makes of a model of `request` (EXACT, ROUNDED, or None: not possible), and why."""
    if request.method.name == "ivf" and request.method.encoder.name == "pq":
        return None, "an IVF-PQ cannot be replayed: its codewords are trained on what the centroids leave over"
    if request.quantization_bits is not None:
        return (
            None,
            "the binary encoder cannot be replayed: the cluster turns vectors into bits at thresholds of its own",
        )
    if request.data_type == "byte":
        return ROUNDED, "a replay rounds the centroids of byte vectors to whole numbers"
    return (
        EXACT,
        "faiss copies as many training vectors as there are clusters, so the cluster arrives at these codebooks",
    )


def choose(route: str, request: TrainingRequest, no_swap: str, has_sample: bool) -> Choice:
    """The route to take.

    Args:
      route: one of ROUTES.
      no_swap: why this user cannot swap; empty for one that can.
      has_sample: whether there are vectors that the cluster could train on.

    Raises:
      RequestError: `route` cannot be taken, or none can.
    """
    fidelity, reason = replay_fidelity(request)
    if route == REPLAY:
        if fidelity is None:
            raise RequestError(f"route replay is not possible: {reason}; use swap or delegate")
        return Choice(REPLAY, f"replay, as asked: {reason}")
    if route == SWAP:
        if no_swap:
            raise RequestError(f"route swap is not possible: {no_swap}; use replay or delegate")
        return Choice(SWAP, "swap, as asked: the document's blob is replaced by ours")
    if route == DELEGATE:
        if not has_sample:
            raise RequestError("route delegate is not possible: there is no sample of vectors to hand to the cluster")
        return Choice(DELEGATE, f"delegate, as asked: {_delegated(request)}")
    if route != AUTO:
        raise RequestError(f"route {route!r} is not one of {', '.join(ROUTES)}")
    if fidelity == EXACT:
        return Choice(REPLAY, f"replay: {reason}")
    if not no_swap:
        return Choice(SWAP, f"swap: {reason}, and this user may write to .opensearch-knn-models")
    if fidelity == ROUNDED:
        return Choice(REPLAY, f"replay: {no_swap}; {reason}")
    if has_sample:
        return Choice(DELEGATE, f"delegate: {reason}, and {no_swap}; {_delegated(request)}")
    raise RequestError(f"{reason}, {no_swap}, and there is no sample of vectors to hand to the cluster (delegate)")


def _delegated(request: TrainingRequest) -> str:
    told = "the cluster trains on our sample, so the codebooks are its own, not ours"
    if (request.quantization_bits or 1) > 1:
        told += f"; it has no training for {request.quantization_bits} bits that fits its own segments"
    return told


def training_vectors(
    route: str, request: TrainingRequest, codebooks: Codebooks, sample: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """What the temporary index is to hold.

    Args:
      route: REPLAY, SWAP or DELEGATE.
      request: as the target cluster resolves it.
      codebooks: of the model.
      sample: (n, columns) vectors; for DELEGATE. Normalised in place for cosinesimil.

    Returns:
      (n, columns) vectors, and how many documents the cluster wants to count before it trains, vectors included.

    Raises:
      RequestError: the sample is too small.
    """
    if route == DELEGATE:
        assert sample is not None  # `choose` saw to it
        vectors = sample
        if request.data_type == "float":
            vectors = faiss_training.prepare(sample, request)  # the cluster would train on vectors of any length
        request.check_count(len(vectors))
    elif request.quantization_bits is not None:
        # Only the dimension matters: whatever comes of it is replaced.
        vectors = np.random.default_rng(0).standard_normal((request.nlist or 1, request.dimension), np.float32)
    elif replay_fidelity(request)[0] is None:
        assert codebooks.coarse is not None
        # As few as faiss accepts: the centroids, over again if there are more codewords than centroids.
        wanted = max(len(codebooks.coarse), request.minimum_vectors)
        vectors = np.resize(codebooks.coarse, (wanted, codebooks.coarse.shape[1]))
    else:
        vectors = codebooks.replay_vectors(request.data_type)
    return vectors, max(len(vectors), request.minimum_documents)


def arrives_as(route: str, request: TrainingRequest, codebooks: Codebooks) -> Codebooks | None:
    """The codebooks that the cluster will have by this route; None if they are not ours to know."""
    if route == DELEGATE:
        return None
    if route == REPLAY and request.data_type == "byte":
        rounded = codebooks.replay_vectors("byte").astype(np.float32)
        return Codebooks(codebooks.kind, codebooks.dimension, codebooks.metric, rounded, None)
    return codebooks
