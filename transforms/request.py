# SPDX-License-Identifier: Apache-2.0
"""`TrainingRequest`: what to train, as the k-NN plugin's Train Model API says it.

Reading and checking the body is in `transforms.request_body`, what the cluster makes of `method` in
`transforms.method`. Nothing here does I/O, so checks that need a mapping or a cluster state are not made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transforms import method as methods
from transforms.errors import RequestError
from transforms.method import INT_MAX, Encoder, Method, validation_failed
from transforms.request_body import (
    MAX_SEARCH_SIZE,
    Fields,
    check_model_id,
    check_set,
    read_fields,
    read_json,
    resolve,
)
from transforms.versions import NEWEST_TARGET, VERSION_RULES, parse_version, show_version

__all__ = ["NEWEST_TARGET", "VERSION_RULES", "Encoder", "Method", "TrainingRequest"]

# OpenSearch reads a JSON string of at most 50 000 000 characters; base64 makes 4 of 3 bytes.
MAX_BLOB_BYTES = 37_500_000
MAX_PRECOMPUTED_TABLE_BYTES = 2**31  # faiss::precomputed_table_max_bytes
MAX_CODE_SIZE = 24  # faiss::ProductQuantizer
POINTS_PER_CENTROID = 256  # faiss::ClusteringParameters::max_points_per_centroid


@dataclass(frozen=True)
class TrainingRequest:
    """A training request with everything resolved as the cluster at `target_version` would resolve it."""

    model_id: str | None
    preference: str | None
    training_index: str | None
    training_field: str
    dimension: int
    max_training_vector_count: int
    search_size: int
    description: str
    method: Method
    space_type: str
    data_type: str
    mode: str | None
    compression_level: str | None
    target_version: str
    engine: str = "faiss"

    @classmethod
    def parse(
        cls,
        body: str | bytes,
        *,
        model_id: str | None = None,
        preference: str | None = None,
        node_id: str | None = None,
        target_version: str = NEWEST_TARGET,
        require_index: bool = True,
        require_field: bool = True,
    ) -> TrainingRequest:
        """The request in a JSON text. Raises RequestError with the plugin's message.

        `node_id` is the documentation's name for `preference`. `require_index` and `require_field` are False for
        sources that have no index or name their column otherwise.
        """
        fields = read_fields(read_json(body), parse_version(target_version))
        return cls._of(fields, model_id, preference, node_id, target_version, require_index, require_field)

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, object],
        *,
        model_id: str | None = None,
        preference: str | None = None,
        node_id: str | None = None,
        target_version: str = NEWEST_TARGET,
        require_index: bool = True,
        require_field: bool = True,
    ) -> TrainingRequest:
        """The request in a mapping of body fields, under the same rules as `parse`. Raises RequestError."""
        read = read_fields(fields.items(), parse_version(target_version))
        return cls._of(read, model_id, preference, node_id, target_version, require_index, require_field)

    @classmethod
    def _of(
        cls,
        fields: Fields,
        model_id: str | None,
        preference: str | None,
        node_id: str | None,
        target_version: str,
        require_index: bool,
        require_field: bool,
    ) -> TrainingRequest:
        if preference and node_id and preference != node_id:
            raise RequestError(f'preference "{preference}" and node_id "{node_id}" mean the same but differ')
        version = parse_version(target_version)
        check_set(fields, version, require_index, require_field)
        resolved = resolve(fields, version)
        check_model_id(model_id)
        return cls(
            model_id=model_id if model_id and model_id.strip() else None,
            preference=preference or node_id or None,
            training_index=fields.training_index,
            training_field=fields.training_field or "",
            dimension=resolved.dimension,
            max_training_vector_count=fields.max_training_vector_count or INT_MAX,
            search_size=fields.search_size or MAX_SEARCH_SIZE,
            description=fields.description or "",
            method=resolved.method,
            space_type=resolved.space_type,
            data_type=resolved.data_type,
            mode=resolved.mode,
            compression_level=resolved.compression_level,
            target_version=show_version(version),
        )

    # --- parameters of the method and its encoder; None where they do not apply ---

    def _method_parameter(self, method_name: str, name: str) -> int | None:
        return self.method.parameters[name] if self.method.name == method_name else None

    def _pq_parameter(self, name: str) -> int | None:
        if self.method.encoder.name != "pq":
            return None
        default: int = methods.IVF_PQ.parameters[name].default
        return self.method.encoder.parameters.get(name, default)

    @property
    def nlist(self) -> int | None:
        """Number of IVF centroids."""
        return self._method_parameter("ivf", "nlist")

    @property
    def nprobes(self) -> int | None:
        """Number of IVF lists a query visits by default."""
        return self._method_parameter("ivf", "nprobes")

    @property
    def hnsw_m(self) -> int | None:
        """HNSW's number of neighbours."""
        return self._method_parameter("hnsw", "m")

    @property
    def ef_construction(self) -> int | None:
        """HNSW's candidate list while building."""
        return self._method_parameter("hnsw", "ef_construction")

    @property
    def ef_search(self) -> int | None:
        """HNSW's candidate list while searching."""
        return self._method_parameter("hnsw", "ef_search")

    @property
    def pq_m(self) -> int | None:
        """Number of PQ sub-vectors."""
        return self._pq_parameter("m")

    @property
    def code_size(self) -> int | None:
        """Bits of one PQ code."""
        return self._pq_parameter("code_size")

    @property
    def quantization_bits(self) -> int | None:
        """Bits per dimension of the `binary` encoder."""
        if self.method.encoder.name != "binary":
            return None
        return self.method.encoder.parameters.get("bits", methods.BINARY.parameters["bits"].default)

    # --- what faiss is asked for ---

    @property
    def index_description(self) -> str:
        """The faiss factory string (`MethodAsMapBuilder`, `AbstractFaissMethod.adjustIndexDescription`)."""
        head = f"IVF{self.nlist}" if self.method.name == "ivf" else f"HNSW{self.hnsw_m}"
        return f"{'B' if self.is_binary else ''}{head},{self._encoder_description()}"

    def _encoder_description(self) -> str:
        encoder = self.method.encoder
        if self.data_type == "byte":
            return "SQ8_direct_signed"
        if encoder.name == "pq":
            # HNSW's PQ takes no code size since 2.10: faiss has it fixed at 8 bits.
            return f"PQ{self.pq_m}" if self.method.name == "hnsw" else f"PQ{self.pq_m}x{self.code_size}"
        if encoder.name == "sq" and encoder.parameters.get("bits") != 1:
            return "SQfp16"
        return "Flat"  # sq with one bit too: the plugin quantises outside faiss, and for IVF not at all

    @property
    def is_binary(self) -> bool:
        """True when faiss trains a binary index: binary vectors, or the `binary` encoder's bits."""
        return self.data_type == "binary" or self.method.encoder.name == "binary"

    @property
    def trained_dimension(self) -> int:
        """Dimension of the faiss index in the blob; bits for a binary index.

        With the `binary` encoder a segment's vectors have bits * dimension bits, padded to whole bytes
        (`OneBitScalarQuantizationState.getDimensions`, `MultiBitScalarQuantizationState.getDimensions`), and they are
        added with the blob's own dimension as stride, so that is what a usable blob has. The cluster's `_train` passes
        the plain dimension instead (`TrainingJob.run`), which is the same for one bit only.
        """
        bits = self.quantization_bits
        return self.dimension if bits is None else math.ceil(bits * self.dimension / 8) * 8

    @property
    def inner_product(self) -> bool:
        """True for METRIC_INNER_PRODUCT, False for METRIC_L2. A binary index has no metric of its own."""
        return not self.is_binary and self.space_type in ("innerproduct", "cosinesimil")

    @property
    def normalize(self) -> bool:
        """True when vectors are scaled to unit length before they are used (`NormalizeVectorTransformer`)."""
        return self.space_type == "cosinesimil"

    # --- how much of what ---

    def _centroids(self) -> int:
        """The largest number of clusters one of faiss's k-means runs looks for."""
        code_size = self.code_size
        return max(self.nlist or 0, 0 if code_size is None else 2**code_size)

    @property
    def usable_vectors(self) -> int:
        """Number of vectors beyond which faiss would draw its own sample: 256 for each centroid."""
        return POINTS_PER_CENTROID * self._centroids()

    @property
    def minimum_vectors(self) -> int:
        """Fewest vectors faiss can train on: as many as its largest k-means has centroids."""
        return self._centroids()

    @property
    def blob_bytes(self) -> int:
        """Size of the serialised model in bytes, as `faiss::write_index` of the trained, empty index gives it."""
        if self.method.name == "hnsw":
            return _hnsw_pq_bytes(self.hnsw_m or 0, self.dimension)
        nlist = self.nlist or 0
        if self.is_binary:
            return _BINARY_IVF_BYTES + nlist * self.trained_dimension // 8
        coarse = _IVF_BYTES + 4 * nlist * self.dimension
        description = self._encoder_description()
        if description == "Flat":
            return coarse
        if description.startswith("PQ"):
            return coarse + _PQ_EXTRA_BYTES + 4 * self.dimension * 2 ** (self.code_size or 0)
        return coarse + _SQ_EXTRA_BYTES

    # --- documents ---

    @property
    def model_definition(self) -> dict[str, Any]:
        """`model_definition` of the model document."""
        return self.method.definition

    def body(self) -> dict[str, Any]:
        """The Train API body that resolves to this request; the index and field are as given."""
        body: dict[str, Any] = {"training_index": self.training_index, "training_field": self.training_field or None}
        body = {name: value for name, value in body.items() if value is not None}
        body["dimension"] = self.dimension
        if self.max_training_vector_count != INT_MAX:
            body["max_training_vector_count"] = self.max_training_vector_count
        if self.search_size != MAX_SEARCH_SIZE:
            body["search_size"] = self.search_size
        if self.description:
            body["description"] = self.description
        body["data_type"] = self.data_type
        if self.mode is not None:
            body["mode"] = self.mode
        if self.mode is not None and parse_version(self.target_version) < (2, 19, 0):
            # Mode and method exclude each other there, so the method is what mode and level resolve to.
            return {**body, "compression_level": self.compression_level, "spaceType": self.space_type}
        # No compression_level: the encoder says it, and not every level it can say is accepted.
        definition = self.method.definition
        if self.hnsw_m == methods.HNSW_M_DEFAULT:
            del definition["parameters"]["m"]  # a given m has to divide the dimension, the same default has not
        return {**body, "method": {"engine": self.engine, "space_type": self.space_type, **definition}}

    # --- checks that need to know more than the request ---

    def check_count(self, count: int, *, documents: int | None = None) -> None:
        """Refuses a source with too few vectors. Raises RequestError.

        `count` is the number of vectors that can be read. `documents` is the number of documents in the training
        index, with or without a vector: where it is given the cluster's own minimum applies
        (`AbstractFaissPQEncoder.validateEncoderConfig`, in 2.19 `AbstractKNNMethod`).
        """
        minimum = self.minimum_documents
        if documents is not None and min(documents, self.max_training_vector_count) < minimum:
            raise validation_failed([f"Number of training points should be greater than {minimum}"])
        usable = min(count, self.max_training_vector_count)
        if usable >= self.minimum_vectors:
            return
        limit = f" (max_training_vector_count is {self.max_training_vector_count})" if usable < count else ""
        if (self.nlist or 0) > usable:
            raise RequestError(
                f"nlist is {self.nlist}, but there are only {usable} training vectors{limit}: "
                f"nlist must be at most {usable}, or at least {self.minimum_vectors} vectors are needed"
            )
        raise RequestError(
            f"code_size is {self.code_size}, which needs 2^{self.code_size} = {self.minimum_vectors} training vectors, "
            f"but there are only {usable}{limit}"
        )

    @property
    def minimum_documents(self) -> int:
        """Fewest documents, with or without a vector, of an index that the cluster's own `_train` accepts."""
        version = parse_version(self.target_version)
        given_code_size = self.method.encoder.parameters.get("code_size")
        if version < (2, 19, 0):
            return 0
        if version < (3, 0, 0):
            if self.nlist is None or given_code_size is None:
                return 1000
            return max(self.nlist, 2**given_code_size)
        if self.method.encoder.name != "pq":
            return 0
        return 1000 if given_code_size is None else 2**given_code_size

    def check_limits(self, allow_large_model: bool = False) -> list[str]:
        """Refuses what the API accepts and no cluster can use; returns warnings. Raises RequestError."""
        warnings = []
        if self.normalize and self.data_type == "byte":
            raise RequestError(
                f"space_type is cosinesimil and data_type byte, but OpenSearch {self.target_version} takes no document "
                "for such a model: it cannot normalise bytes. For vectors of one length innerproduct is the same; or "
                "take data_type float"
            )
        code_size = self.code_size
        if code_size is not None and code_size > MAX_CODE_SIZE:
            raise RequestError(
                f"code_size is {code_size}, but faiss can train code sizes from 1 to {MAX_CODE_SIZE} only"
            )
        table = self._precomputed_table_bytes()
        if table > MAX_PRECOMPUTED_TABLE_BYTES:
            raise RequestError(
                f"nlist {self.nlist} * m {self.pq_m} * 2^code_size {code_size} * 4 bytes make a search table of "
                f"{table} bytes, but at most {MAX_PRECOMPUTED_TABLE_BYTES} are allowed: with more, searching crashes "
                "the node (https://github.com/opensearch-project/k-NN/issues/3078). Lower nlist, m or code_size"
            )
        if self.blob_bytes > MAX_BLOB_BYTES:
            message = (
                f"the model has {self.blob_bytes} bytes (nlist {self.nlist}, dimension {self.dimension}), but a "
                f"cluster reads at most {MAX_BLOB_BYTES} unless opensearch.xcontent.string.length.max is raised on "
                "every node"
            )
            if not allow_large_model:
                raise RequestError(message)
            warnings.append(message)
        if self.method.name == "ivf" and self.method.encoder.name == "sq" and self._encoder_description() == "Flat":
            warnings.append(
                f"sq with 1 bit does not compress ivf vectors: the cluster builds {self.index_description} "
                f"although it reports compression_level {self.compression_level}"
            )
        if self.is_binary and self.nprobes is not None and self.nprobes > 1:
            warnings.append(
                f"nprobes {self.nprobes} is not stored in the model: of a binary index searches visit 1 list unless "
                f'they say {{"method_parameters": {{"nprobes": {self.nprobes}}}}}'
            )
        return warnings

    def _precomputed_table_bytes(self) -> int:
        """Size of faiss's IVF-PQ table for L2 (`IndexIVFPQ::precompute_table`); 0 where there is none."""
        if self.nlist is None or self.pq_m is None or self.code_size is None or self.inner_product:
            return 0
        return self.nlist * self.pq_m * 2**self.code_size * 4


# --- sizes of serialised indexes (faiss/impl/index_write.cpp) ----------------------------------------------------

# Bytes beside the centroids and codewords, measured on trained indexes; tests hold them to faiss's own output.
_IVF_BYTES = 139  # heads of index and flat quantizer, direct map, empty inverted lists
_PQ_EXTRA_BYTES = 41  # by_residual, code size, head of the product quantizer
_SQ_EXTRA_BYTES = 45  # scalar quantizer, code size, by_residual
_BINARY_IVF_BYTES = 115
_HNSW_PQ_BYTES = 195  # heads of graph, index and its IndexPQ storage
_HNSW_LEVEL_BYTES = 12  # a double in assign_probas and an int in cum_nneighbor_per_level


def _hnsw_pq_bytes(m: int, dimension: int) -> int:
    """An empty graph over 2^8 codewords; its level table depends on m (`faiss::HNSW::set_default_probas`)."""
    levels = 0
    while m > 1 and m**-levels * (1 - 1 / m) >= 1e-9:
        levels += 1
    return _HNSW_PQ_BYTES + _HNSW_LEVEL_BYTES * levels + 4 * dimension * 2**8
